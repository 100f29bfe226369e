"""What a stage's modules keep of one session from step to step, apart from its KV.

Knows values by the paths of attributes; no modules and no layers of KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.kv.layer_state import Plain, State


class KeptValues:
    """The values, by the paths of attributes, such as ``model.layers.0.mixer.state``; of those that `holds` tells are here."""

    def __init__(self, holds: Callable[[str], bool] = lambda _name: True) -> None:
        self.values: dict[str, Any] = {}
        self.holds = holds
        self.version = 0  # how often they have changed

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the tensors."""
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors_in(self.values)}
        return sum(each.nbytes() for each in storages.values())

    def copy(self) -> KeptValues:
        """Return an independent copy."""
        copied = KeptValues(self.holds)
        copied.values, copied.version = copied_value(self.values), self.version
        return copied

    def clear(self) -> None:
        """Forget the values, so that the next step begins with what modules hold by themselves."""
        self.values = {}
        self.version += 1

    def adopt(self, other: KeptValues) -> None:
        """Adopt the values that belong here from those of the same session in another stage."""
        self.values |= {name: value for name, value in other.values.items() if self.holds(name)}
        self.version += 1

    def append_rows(self, others: Sequence[KeptValues], num_rows: Sequence[int]) -> None:
        """Append the rows of other sessions to what has one entry for each; `num_rows` are those of this session and the others.

        Raises ProtocolError if something else differs between them.
        """
        parts = [each.values for each in (self, *others)]
        if any(each.keys() != self.values.keys() for each in parts):
            raise ProtocolError("rows of sessions can't be joined: modules keep other values of each")
        self.values = {name: _joined(name, [each[name] for each in parts], num_rows) for name in self.values}
        self.version += 1

    def read_state(self, belongs: Callable[[str], bool]) -> State:
        """Return the values of some places to send them; raise ProtocolError if some can't be sent."""
        state = {name: value for name, value in self.values.items() if belongs(name)}
        for name, value in state.items():
            if value is not None and not isinstance(value, Tensor | bool | int | float | str):
                raise ProtocolError(f"a {type(value).__name__} that modules keep at {name} can't be sent")
        return state

    def write_state(self, state: Mapping[str, Tensor | Plain], device: torch.device) -> None:
        """Keep copies of values that have been sent, on a device; raise ProtocolError unless they belong here."""
        for name in state:
            if not self.holds(name):
                raise ProtocolError(f"a value arrived for {name!r:.200}, and this stage has no such place")
        copies = {id(each): each.to(device, copy=True) for each in state.values() if isinstance(each, Tensor)}
        self.values |= {name: copies.get(id(value), value) for name, value in state.items()}
        self.version += 1


def _joined(name: str, values: Sequence[Any], num_rows: Sequence[int]) -> Any:
    """Return one value of several sessions' ones, row after row if each has one entry for each row."""
    first, *others = values
    if all(
        isinstance(each, Tensor) and each.shape[:1] == (rows,) and each.shape[1:] == first.shape[1:]
        for each, rows in zip(values, num_rows, strict=True)
    ):
        return torch.cat(list(values))
    if not all(torch.equal(each, first) if isinstance(first, Tensor) else each == first for each in others):
        raise ProtocolError(f"rows of sessions can't be joined: what modules keep at {name} differs")
    return first


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def copied_value(value: Any) -> Any:
    """Return a copy that no change in place reaches: of dictionaries and sequences, and of the tensors in them."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, copied_value(each)) for key, each in value.items())
    if isinstance(value, list | tuple | set):
        return type(value)(copied_value(each) for each in value)
    return value

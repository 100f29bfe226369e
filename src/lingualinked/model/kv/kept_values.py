"""What a stage's modules keep of one session from step to step, apart from its KV.

Knows values by the paths of attributes; no modules and no layers of KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
                raise ProtocolError(f"a value arrived for {name!r:.200}, and this stage has no such module")
        copies = {id(each): each.to(device, copy=True) for each in state.values() if isinstance(each, Tensor)}
        self.values |= {name: copies.get(id(value), value) for name, value in state.items()}
        self.version += 1


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

"""What a model keeps of one text in an object of its own class, which is no KV cache of transformers.

The object holds what all layers keep; in a stage, only what its own layers keep there counts. Knows neither models nor stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.model.kv.layer_state import Plain, State, dtype_of, num_bytes, rebuilt, walk

_SLICED, _IN_DICT, _IN_LIST = (
    "layers",
    "layer-of-dict",
    "layer-of-list",
)  # where the number of a layer belongs in a path


class OwnState:
    """The object, which a model's forward gets and returns; None before the first step."""

    def __init__(self, config: PreTrainedConfig, module: ModuleType, num_layers: int) -> None:
        self.value: Any = None
        self.num_rows = 0
        self.version = 0
        self._config, self._module, self._num_layers = config, module, num_layers

    def keep(self, value: Any, num_rows: int) -> None:
        """Keep what a step has returned."""
        self.value, self.num_rows = value, num_rows
        self.version += 1

    @property
    def content(self) -> Any:
        """The containers of what is kept."""
        return self.value if self.value is None or isinstance(self.value, list | tuple) else vars(self.value)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return num_bytes({path: each for path, each in walk(self.content) if isinstance(each, Tensor)})

    def copy(self) -> OwnState:
        """Return an independent copy."""
        copied = OwnState(self._config, self._module, self._num_layers)
        copied.num_rows, copied.value = self.num_rows, rebuilt(self.content, torch.clone)
        if isinstance(self.content, dict):
            copied.value = object.__new__(type(self.value))
            vars(copied.value).update(rebuilt(self.content, torch.clone))
        return copied

    def check_order(self, rows: Tensor) -> None:
        """Raise ArgumentError unless an order leaves all rows where they are."""
        if rows.tolist() != list(range(self.num_rows)):
            raise ArgumentError(
                f"rows of what a model of the type {self._config.model_type} keeps of a text can't be reordered or joined"
            )

    def check_crop(self) -> None:
        """Raise ArgumentError: nothing is forgotten again."""
        if self.value is not None:
            raise ArgumentError(
                f"can't crop what a model of the type {self._config.model_type} keeps of a text: run the text again"
            )

    def layer(self, index: int) -> OwnLayerState:
        """Return what one layer keeps, to move it."""
        return OwnLayerState(self, index, self._config, self._module, self._num_layers)


class OwnLayerState:
    """What one layer keeps in such an object, and what belongs to no layer."""

    def __init__(
        self, own: OwnState, index: int, config: PreTrainedConfig, module: ModuleType, num_layers: int
    ) -> None:
        self._own, self._index, self._num_layers = own, index, num_layers
        self._config, self._module = config, module

    @property
    def version(self) -> int:
        """Another number after each step."""
        return self._own.version

    @property
    def num_rows(self) -> int:
        """Number of rows held."""
        return self._own.num_rows

    def read_state(self) -> State:
        """Return the state; raise ProtocolError if it can't be sent."""
        own = self._own
        state: State = {"num_rows": own.num_rows}
        if isinstance(own.content, dict):
            state["class"] = type(own.value).__name__
        for path, value in self._parts(own.content, ()):
            name = "state." + ".".join(path)
            if isinstance(value, torch.dtype):
                state[name] = str(value)
            elif value is None or isinstance(value, bool | int | float | Tensor):
                state[name] = value
            elif not isinstance(value, PreTrainedConfig):
                raise ProtocolError(
                    f"a {type(value).__name__} that a {self._config.model_type} keeps at {name} can't be sent"
                )
        return state

    def _parts(self, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Yield what belongs to the layer, or to none, with paths in which words replace the number of the layer."""
        if isinstance(value, dict | list | tuple):
            items = dict(value.items() if isinstance(value, dict) else enumerate(value))
            tensors = [each for each in items.values() if isinstance(each, Tensor)]
            is_sliced = len(tensors) == len(items) and all(
                each.ndim > 2 and each.shape[-1] == self._num_layers for each in tensors
            )
            if is_sliced:
                for key, each in items.items():
                    yield (*path, _SLICED, str(key)), each[..., self._index].contiguous()
            elif set(items) == set(range(self._num_layers)):
                word = _IN_DICT if isinstance(value, dict) else _IN_LIST
                yield from self._parts(items[self._index], (*path, word))
            else:
                for key, each in items.items():
                    yield from self._parts(each, (*path, str(key)))
        else:
            yield path, value

    @torch.inference_mode()
    def write_state(self, state: Mapping[str, Tensor | Plain], device: torch.device) -> None:
        """Put what another one has read in its place; of layers that have not come, zeros stand there.

        Raises ProtocolError if it does not fit.
        """
        content, num_rows = self._content(state.get("class")), state.get("num_rows")
        if not isinstance(num_rows, int) or num_rows < 0:
            raise ProtocolError(f"a state with num_rows={num_rows!r} arrived")
        try:
            for name, value in sorted(state.items()):
                if name.startswith("state."):
                    self._put(
                        content,
                        name.split(".")[1:],
                        value.to(device, copy=True) if isinstance(value, Tensor) else value,
                    )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ProtocolError(f"a state arrived that does not fit a {self._config.model_type}: {error}") from error
        self._own.num_rows = num_rows
        self._own.version += 1

    def _content(self, name: object) -> Any:
        """Return the containers of what is kept here, made anew if there is nothing yet."""
        own = self._own
        if own.value is None and name is None:
            own.value = []
        elif own.value is None:
            cls = getattr(self._module, str(name), None)
            if not isinstance(cls, type) or cls.__module__ != self._module.__name__:
                raise ProtocolError(f"{name!r} is not a class of {self._module.__name__}")
            own.value = object.__new__(cls)
            vars(own.value)["config"] = self._config
        if isinstance(own.value, tuple):
            own.value = list(own.value)
        return own.content

    def _put(self, place: Any, path: list[str], value: Any) -> None:
        first, *rest = path
        if first == _SLICED:
            whole = _item(place, int(rest[0]), lambda: value.new_zeros((*value.shape, self._num_layers)))
            whole[..., self._index] = value
            return
        if isinstance(value, str):
            value = dtype_of(value)
        if first in (_IN_DICT, _IN_LIST):
            for index in range(self._num_layers):
                is_own = index == self._index
                if not rest:
                    held = _item(place, index, lambda: torch.zeros_like(value))
                    place[index] = value if is_own else held
                else:
                    held = list(_item(place, index, tuple))
                    number = int(rest[0])
                    held += [torch.zeros_like(value)] if len(held) <= number else []
                    held[number] = value if is_own else held[number]
                    place[index] = tuple(held)
            return
        if not rest:
            place[first] = value
            return
        self._put(_item(place, first, dict if rest[0] == _IN_DICT else list), rest, value)


def _item(place: Any, key: Any, make: Any) -> Any:
    """Return the item of a container, made if there is none yet."""
    if isinstance(place, dict):
        if key not in place:
            place[key] = make()
    elif key == len(place):
        place.append(make())
    return place[key]

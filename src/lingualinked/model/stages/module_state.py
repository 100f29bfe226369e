"""What forward passes change in a stage's modules, apart from the KV cache: each session has its own.

Modules of some models keep values from one pass to the next, in attributes or buffers. They are found by comparing the modules
before and after a session's first steps. From then on, a step puts the session's values in place, and takes them out again.
Knows modules; no sessions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lingualinked.errors import UncuttableModelError
from lingualinked.model.hf_internals import computing, recording
from lingualinked.model.kv.kept_values import KeptValues, copied_value

_OF_TORCH = frozenset(vars(nn.Module())) | {"forward", recording.INSTALLED}  # hooks replace the last two
_ABSENT = object()
_BUFFERS = "._buffers"  # behind a module's path, in the path of one
_MAX_COPY_BYTES = 1 << 19  # of a tensor that a pass may turn out to change in place
_NUM_LATER_STEPS = 2  # that are watched, besides the first one of every session


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """An attribute, or a buffer, that passes change, in the dictionary that holds it; `in_place`: also its content."""

    held: dict[str, Any]
    name: str
    in_place: bool = False

    def get(self) -> Any:
        return self.held.get(self.name, _ABSENT)

    def put(self, value: Any) -> None:
        if value is _ABSENT:
            self.held.pop(self.name, None)
        else:
            self.held[self.name] = value


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """A value before a pass, with what a change in place of it changes, and a copy; `_ABSENT` if it is too large for one."""

    value: Any
    mark: Any
    copy: Any

    @classmethod
    def of(cls, value: Any) -> _Seen:
        is_large = isinstance(value, Tensor) and value.nbytes > _MAX_COPY_BYTES
        return cls(value, _mark(value), _ABSENT if is_large else copied_value(value))

    @property
    def has_changed(self) -> bool:
        """Whether its content is another one now."""
        return bool(_mark(self.value) != self.mark)

    def is_replaced(self, value: Any) -> bool:
        """Whether another value is in its place."""
        is_plain = isinstance(value, bool | int | float | str) and type(value) is type(self.value)
        return value is not self.value and not (is_plain and value == self.value)


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
    """What a module held before a pass; `changing` is what can change in place, `weights` is of its parameters."""

    values: dict[str, Any]
    changing: dict[str, _Seen]
    weights: list[Any]

    @classmethod
    def of(cls, module: nn.Module) -> _View:
        values = _values_of(module)
        return cls(
            values,
            {name: _Seen.of(each) for name, each in values.items() if isinstance(each, Tensor | dict | list | set)},
            _weights_of(module),
        )

    def is_same(self, values: dict[str, Any]) -> bool:
        """Return whether the same objects, unchanged, are in the same order there now."""
        are_same = len(values) == len(self.values) and all(map(operator.is_, values.values(), self.values.values()))
        return are_same and not any(each.has_changed for each in self.changing.values())

    def see(self, name: str) -> _Seen:
        """Return what a value was before the pass."""
        return self.changing.get(name) or _Seen.of(self.values.get(name, _ABSENT))


class ModuleState:
    """What the passes of a stage's sessions change in its modules; rotary embeddings have a way of their own (`rotary.py`)."""

    def __init__(self, model: nn.Module, model_type: str) -> None:
        rotary = set(computing.length_ropes(model))
        own = f"{__package__.partition('.')[0]}."
        self._modules = {
            path: module
            for path, module in model.named_modules()
            if module not in rotary and not type(module).__module__.startswith(own)
        }
        self._model_type = model_type
        self._places: dict[str, _Place] = {}
        self._num_later = 0  # steps that have been watched
        self.changes_weights = False  # whether a step has changed parameters in place

    def __bool__(self) -> bool:
        """Whether passes have been seen to change anything."""
        return bool(self._places)

    def holds(self, name: str) -> bool:
        """Return whether the path is that of a model's own attribute, of a module here, not of one in another stage."""
        return self._owner_of(name)[0] in self._modules and name.rpartition(".")[2] not in _OF_TORCH

    def _owner_of(self, name: str) -> tuple[str, bool]:
        """Return the path of the module that has an attribute, and whether it is a buffer."""
        owner = name.rpartition(".")[0]
        return owner.removesuffix(_BUFFERS), owner.endswith(_BUFFERS)

    def _place_of(self, name: str) -> _Place:
        """Return the place of an attribute."""
        path, is_buffer = self._owner_of(name)
        held = vars(self._modules[path])
        return _Place(held["_buffers"] if is_buffer else held, name.rpartition(".")[2])

    @contextlib.contextmanager
    def lent_to(self, kept: KeptValues, *, is_first: bool) -> Iterator[None]:
        """Let modules hold what they keep of a session, within the context, whose first step it may be. Needs `GLOBAL_STATE`.

        Raises UncuttableModelError if the step changes a large tensor that all sessions share.
        """
        # 1) put the session's values in the places of the modules' own
        watches = is_first or self._num_later < _NUM_LATER_STEPS
        self._num_later += watches and not is_first
        before = self._see_all() if watches else {}
        for name in kept.values.keys() - self._places.keys():  # seen in another stage
            self._places[name] = self._place_of(name)
        own = {name: place.get() for name, place in self._places.items()}
        for name, place in self._places.items():
            place.put(
                kept.values[name] if name in kept.values else copied_value(own[name]) if place.in_place else own[name]
            )
        spoiled = ""
        try:
            yield
        finally:
            # 2) find other places where the step has changed something
            changed = [path for path, view in before.items() if view.weights != _weights_of(self._modules[path])]
            self.changes_weights |= bool(changed)
            changes_data = any(not each.is_meta for path in changed for each in self._modules[path].parameters())
            for name, place, seen in self._changes(before):
                if changes_data and isinstance(place.get(), bool | int | float | str):
                    continue  # it says that the weights have been changed, once for all sessions
                self._places[name] = place
                own[name] = seen.copy if place.in_place else seen.value
                if place.in_place and seen.copy is _ABSENT:
                    own[name], spoiled = seen.value, name
            # 3) take the session's values out, and put the modules' own back
            values = {name: place.get() for name, place in self._places.items()}
            kept.values = {name: value for name, value in values.items() if value is not own[name]}
            kept.version += 1
            for name, place in self._places.items():
                place.put(own[name])
        if spoiled:
            raise UncuttableModelError(
                self._model_type,
                f"a forward pass changes {spoiled} in place, which is too large for a copy of each session",
            )

    def _see_all(self) -> dict[str, _View]:
        with torch.inference_mode(False):  # else no later change in place of the copies would be seen
            return {path: _View.of(module) for path, module in self._modules.items()}

    def _changes(self, before: dict[str, _View]) -> Iterator[tuple[str, _Place, _Seen]]:
        """Yield what has changed in modules since they were seen, as paths and places."""
        for path, view in before.items():
            module = self._modules[path]
            values = _values_of(module)
            if view.is_same(values):
                continue
            for name in view.values.keys() | values.keys():
                seen, value = view.see(name), values.get(name, _ABSENT)
                if seen.has_changed or seen.is_replaced(value):
                    whole = f"{path}{_BUFFERS if name in vars(module)['_buffers'] else ''}.{name}"
                    yield whole, dataclasses.replace(self._place_of(whole), in_place=seen.has_changed), seen


def _values_of(module: nn.Module) -> dict[str, Any]:
    """Return the values of a module's attributes and buffers."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    buffers: dict[str, Any] = vars(module)["_buffers"]
    return own | buffers


def _weights_of(module: nn.Module) -> list[Any]:
    """Return what a change in place of a module's own parameters changes."""
    return [_mark(each) for each in vars(module)["_parameters"].values()]


def _mark(value: Any) -> Any:
    """Return something that differs once a value has been changed in place."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version  # noqa: SLF001 - no public name
    if isinstance(value, dict | list | set):
        return [(_Same(each), _mark(each)) for each in (value.values() if isinstance(value, dict) else value)]
    return None


class _Same:
    """Equal to another one of the same object."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    __hash__ = None  # type: ignore[assignment]

"""The list of a sharded model's layers, from which layers can be removed: the workers then skip them.

Knows modules, and which layers are skipped; neither workers nor steps.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

from torch import nn

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.stages.layer_skips import LayerSkips
from lingualinked.sharded.sealed.sealing import SealedDict, SealedModule, sealed_class, set_wrapper

if TYPE_CHECKING:
    from lingualinked.cluster.weights.tensor_edits import TensorEdits
    from lingualinked.transmission import Transmission

_ALLOWED = (
    "a list of layers may lose some, get them back in their places, and have nn.Identity() in place of one, to skip it; "
    "change the checkpoint with transformers for anything else"
)


class SealedLayers(SealedModule):
    """Mixin for the class of the list of layers; comes before ``nn.ModuleList``."""

    if TYPE_CHECKING:
        _surgery: weakref.ref[
            LayerSurgery
        ]  # the model has it: a circle would keep the weights until the collector runs

        def __iter__(self) -> Iterator[nn.Module]: ...

    def _change(self, content: list[nn.Module]) -> None:
        surgery = self._surgery()
        if surgery is None:
            _refuse("the model is not there any more")
        surgery.replace(cast("nn.ModuleList", self), content)

    def __setitem__(self, index: int, module: nn.Module) -> None:
        content = list(self)
        if set_wrapper(self, self._path, str(range(len(content))[index]), module):
            return
        content[index] = module
        self._change(content)

    def __delitem__(self, index: int | slice) -> None:
        content = list(self)
        del content[index]
        self._change(content)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self)["_modules"] and isinstance(value, nn.Module):
            self[int(name)] = value
            return
        super().__setattr__(name, value)

    def insert(self, index: int, module: nn.Module) -> None:
        """Put a layer back that has been removed from this place."""
        content = list(self)
        content.insert(index, module)
        self._change(content)

    def append(self, module: nn.Module) -> Self:
        """Put the last layer back, if it has been removed."""
        self._change([*self, module])
        return self

    def extend(self, modules: Iterable[nn.Module]) -> Self:
        """Put the last layers back, if they have been removed."""
        self._change([*self, *modules])
        return self

    __iadd__ = extend

    def pop(self, key: int | slice) -> Any:
        """Remove a layer, and return it."""
        content = list(self)
        popped = content[key]
        del content[key]
        self._change(content)
        return popped


class LayerSurgery:
    """What of the layers of one model is left in its list of layers; all of them if `transmission` has outputs of earlier layers."""

    def __init__(self, layers: nn.ModuleList, edits: TensorEdits, transmission: Transmission) -> None:
        self._all = tuple(layers)
        self._far = [each.name for each in transmission.shortcuts if each.is_of_layer]
        self._edits = edits
        self._current = layers
        vars(layers)["_surgery"] = weakref.ref(self)
        object.__setattr__(layers, "__class__", sealed_class(nn.ModuleList, SealedLayers))

    def replace(self, layers: nn.ModuleList, content: list[nn.Module]) -> None:
        """Make these the layers of the model's list, or raise UnsupportedOperationError."""
        if layers is not self._current:
            _refuse("its list of layers has been replaced by another one: change that one")
        skips = self._find_skips(content)
        with self._edits.between_steps():
            self._edits.skip(skips)
            modules = vars(layers)["_modules"]
            dict.clear(modules)
            dict.update(modules, {str(index): layer for index, layer in enumerate(content)})

    def adopt(self, parent: nn.Module, name: str, layers: nn.ModuleList) -> None:
        """Make another list the model's list of layers, or raise UnsupportedOperationError."""
        skips, before = self._find_skips(list(layers)), self._current
        if layers is before:
            return
        with self._edits.between_steps():
            self._edits.skip(skips)
            state = vars(layers)
            for attribute in ("_adapters", "_path", "_sealed", "_surgery", "_wrapped"):
                state[attribute] = vars(before)[attribute]
            if not isinstance(layers, SealedLayers):
                state["_modules"] = SealedDict(state["_modules"], state["_path"], "_modules")
                object.__setattr__(layers, "__class__", type(before))
            dict.__setitem__(vars(parent)["_modules"], name, layers)
            self._current = layers

    @contextlib.contextmanager
    def skipping(self, indices: Iterable[int]) -> Iterator[None]:
        """Leave layers out of the model's list in this context."""
        layers, content = self._current, list(self._current)
        left_out = [content[index] for index in indices]
        self.replace(layers, [layer for layer in content if all(layer is not each for each in left_out)])
        try:
            yield
        finally:
            self.replace(layers, content)

    def _find_skips(self, content: list[nn.Module]) -> LayerSkips:
        """Return which layers are missing in a list, and which of them a module in it stands for."""
        number_of = {id(layer): index for index, layer in enumerate(self._all)}
        kept: set[int] = set()
        bypassed: list[int] = []
        last = -1
        for module in content:
            is_identity = type(module) is nn.Identity
            index = last + 1 if is_identity else number_of.get(id(module), -1)
            if index <= last or index >= len(self._all):
                _refuse(f"{type(module).__name__} can't be put there: {_ALLOWED}")
            if is_identity:
                bypassed.append(index)
            else:
                kept.add(index)
            last = index
        if not kept:
            _refuse(f"it needs one of its layers: {_ALLOWED}")
        removed = tuple(index for index in range(len(self._all)) if index not in kept and index not in bypassed)
        if self._far and (removed or bypassed):
            _refuse(f"later layers use the output of {', '.join(self._far)}, by numbers that would be those of others")
        return LayerSkips(removed, tuple(bypassed))


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedOperationError(f"changing the layers of a sharded model: {reason}")

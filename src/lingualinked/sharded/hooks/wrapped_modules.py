"""Modules that a user puts in place of submodules that they wrap: they run in the caller, around the stage's own or instead of it.

So do submodules that are given a buffer where they have none, such as a bias.

Knows torch's modules only; neither steps nor what wrappers do.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from lingualinked.errors import UnsupportedOperationError

_WRAPPER, _FREE = "_wrapper", "_free"


class WrappedModules:
    """Which submodules of a model have wrappers; those in a list may get theirs by another list."""

    def __init__(self) -> None:
        self._own: dict[int, dict[str, nn.Module]] = {}  # of each module, as it was sealed
        self._lists: dict[int, tuple[str, nn.ModuleList, tuple[nn.Module, ...]]] = {}  # in place of those of the model
        self.wrapped: set[int] = set()

    def add(self, module: nn.Module) -> None:
        """Add a module of the model, with its submodules."""
        self._own[id(module)] = {name: each for name, each in vars(module)["_modules"].items() if each is not None}

    def replace(self, parent: nn.Module, path: str, name: str, new: object) -> bool:
        """Put a module in the place of one that it wraps, or the latter back; return False if this is something else."""
        modules, sealed = vars(parent)["_modules"], self._own.get(id(parent), {})
        own = sealed.get(name)
        is_wrapped = id(own) in self.wrapped
        if own is None or not isinstance(new, nn.Module) or not (is_wrapped or modules.get(name) is own):
            return False
        if type(own) == type(new) == nn.ModuleList and new is not own:  # noqa: E721 - the classes of both stand for it
            return self._replace_all(own, f"{path}.{name}" if path else name, new)
        wraps = new is not own and any(each is own for each in new.modules())
        if len(modules) != len(sealed) or not (wraps or (new is own and is_wrapped)):
            return False
        vars(own).pop(_WRAPPER, None)
        self.wrapped.discard(id(own))
        if new is not own:
            vars(own)[_WRAPPER] = new
            self.wrapped.add(id(own))
        dict.__setitem__(modules, name, new)
        return True

    def _replace_all(self, own: nn.ModuleList, path: str, new: Any) -> bool:
        """Put each module of a list in the place of the one that it wraps; the model keeps its own list."""
        layers, current = [*self._own[id(own)].values()], [*own]
        if not len(layers) == len(new) == len(current) or all(map(operator.is_, layers, new)):
            return False
        for layer, held, wrapper in zip(layers, current, new, strict=True):
            if not (held is layer or id(layer) in self.wrapped) or all(each is not layer for each in wrapper.modules()):
                return False
        for index, wrapper in enumerate(new):
            if wrapper is not current[index]:
                self.replace(own, path, str(index), wrapper)
        self._lists[id(own)] = path, new, tuple(new)
        return True

    def check(self) -> None:
        """Refuse changes of lists that were put in place of those of the model, which keeps its own."""
        for path, given, known in self._lists.values():
            if len(given) != len(known) or any(each is not before for each, before in zip(given, known, strict=True)):
                raise UnsupportedOperationError(
                    f"the list in place of {path} of a sharded model has been changed, which has no effect: change "
                    f"{path} itself"
                )

    def remove_empty(self, module: nn.Module, name: str) -> bool:
        """Remove a parameter or buffer that is None, whose place a buffer may take; return False if it is none.

        The module runs in the caller from then on.
        """
        for registry in ("_parameters", "_buffers"):
            entries = vars(module)[registry]
            if entries.get(name, self) is None:
                dict.__delitem__(entries, name)
                vars(module)[_FREE] = vars(module).get(_FREE, frozenset()) | {name}
                self.wrapped.add(id(module))
                return True
        return False


def fill_empty(module: nn.Module, name: str, buffer: Tensor | None) -> bool:
    """Register a buffer in the place of what was removed; return False if nothing was."""
    if name not in vars(module).get(_FREE, ()):
        return False
    dict.__setitem__(vars(module)["_buffers"], name, buffer)
    return True


def runs_here(module: nn.Module) -> bool:
    """Return whether a submodule has a buffer that no stage has."""
    return _FREE in vars(module)


def wrapper_of(module: nn.Module) -> nn.Module | None:
    """Return what wraps a submodule, if something does."""
    return vars(module).get(_WRAPPER)

"""Refuses to run a model whose code was replaced in this process, since workers import the original code.

Knows classes, functions and the files that define them; nothing of weights or workers.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils, modeling_rope_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.custom_code import PACKAGE, is_verified

_REMEDY = (
    "workers run the code of transformers as it is installed; restore it, or change an installed copy of the package"
)
_REGISTRIES = (ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
_HOOKS = [
    getattr(nn_module, name) for name in vars(nn_module) if name.startswith("_global_") and name.endswith("_hooks")
]
_ABSENT = object()


class ModelCode:
    """The classes and functions of a model as they were when it was loaded, which its source files must define.

    Made while the model's modules are still of their original classes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        classes = {cls for module in model.modules() for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
        modelling = {cls.__module__ for cls in classes if cls.__module__.startswith(("transformers.models.", PACKAGE))}
        modules = [functional, masking_utils, modeling_rope_utils, *(sys.modules[name] for name in sorted(modelling))]
        self._namespaces: list[tuple[Any, dict[str, Any]]] = []
        for namespace in (*(classes - {nn.Module, PreTrainedModel}), *modules):
            for name, value in vars(namespace).items():
                _check_origin(namespace, name, value)
            self._namespaces.append((namespace, dict(vars(namespace))))
        for name, function in modeling_rope_utils.ROPE_INIT_FUNCTIONS.items():
            _check_file(f"ROPE_INIT_FUNCTIONS[{name!r}]", function)

    def check(self, config: PreTrainedConfig) -> None:
        """Check that neither this code nor the attention function of a config has been replaced."""
        for namespace, known in self._namespaces:
            if vars(namespace) != known:
                _compare(namespace, known)
        for registry in _REGISTRIES:
            name = config._attn_implementation  # noqa: SLF001 - named so in transformers' documentation
            function = registry.get(name)
            if function is not None:
                _check_file(f"{type(registry).__name__}[{name!r}]", function)


def check_observers() -> None:
    """Check that nothing in this process intercepts all modules or operations: it would not reach the workers."""
    if any(_HOOKS):
        name = next(name for name, value in vars(nn_module).items() if any(value is each for each in _HOOKS) and value)
        raise UnsupportedOperationError(
            f"global module hooks ({name}) would not be called for the layers of a sharded model, which run in the workers: "
            "remove them, or hook the whole model"
        )
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():  # noqa: SLF001 - no public name
        for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
            if not (isinstance(mode, DeviceContext) and mode.device.type == "cpu"):
                raise UnsupportedOperationError(
                    f"{type(mode).__name__} would not reach the operations of a sharded model, which run in the workers: "
                    "call the model outside of this context, or use the unsharded model"
                )


def _compare(namespace: Any, known: dict[str, Any]) -> None:
    """Refuse a replaced function; accept all other changes, such as what Python itself stores in a class."""
    state = dict(vars(namespace))
    for name in state.keys() | known.keys():
        before, now = (each.get(name, _ABSENT) for each in (known, state))
        if before is not now and any(_functions(each) for each in (before, now)):
            raise UnsupportedOperationError(
                f"{_name(namespace, name)} has been replaced since the model was loaded: {_REMEDY}"
            )
    known.clear()
    known.update(state)


def _check_origin(namespace: Any, name: str, value: object) -> None:
    """Check that an attribute of a class or module is the one that its source defines."""
    _check_file(_name(namespace, name), value)
    is_method = isinstance(namespace, type) and (not name.startswith("_") or name.startswith("__"))
    for function in _functions(value)[: int(is_method)]:
        written = f"{function.__module__}.{function.__qualname__}"
        if written != _name(namespace, name):
            raise UnsupportedOperationError(f"{_name(namespace, name)} has been replaced by {written}: {_REMEDY}")


def _check_file(name: str, value: object) -> None:
    for function in _functions(value):
        file = function.__code__.co_filename
        if is_verified(file):
            continue
        if not file.startswith(_folders()) and function.__module__.partition(".")[0] not in sys.stdlib_module_names:
            raise UnsupportedOperationError(f"{name} has been replaced by a function of {file}: {_REMEDY}")


def _functions(value: object) -> list[FunctionType]:
    """List the Python functions within a callable or property, including those that it wraps."""
    found: list[FunctionType] = []
    inner: tuple[Any, ...] = ()
    if isinstance(value, classmethod | staticmethod):
        inner = (value.__func__,)
    elif isinstance(value, property):
        inner = (value.fget, value.fset, value.fdel)
    elif isinstance(value, functools.partial):
        inner = (value.func,)
    elif isinstance(value, FunctionType):
        found, inner = [value], (getattr(value, "__wrapped__", None),)
    return [*found, *(function for each in inner for function in _functions(each))]


def _name(namespace: Any, name: str) -> str:
    whose = f"{namespace.__module__}.{namespace.__qualname__}" if isinstance(namespace, type) else namespace.__name__
    return f"{whose}.{name}"


@functools.cache
def _folders() -> tuple[str, ...]:
    """Return the folders of the packages that define models, and of those that some of their modules use."""
    others = [importlib.util.find_spec(name) for name in ("accelerate", "kernels")]
    folders = [
        *torch.__path__,
        *transformers.__path__,
        *(folder for spec in others if spec is not None for folder in spec.submodule_search_locations or ()),
    ]
    return tuple(f"{Path(folder)}/" for folder in folders)

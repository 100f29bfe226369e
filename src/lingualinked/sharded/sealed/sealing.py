"""Makes the submodules of a sharded model read-only, since their counterparts in the workers do the computing.

Knows torch's modules; neither workers nor the effect of a change.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers import PreTrainedModel

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.hf_internals.recording import recorded_modules
from lingualinked.sharded.adapters.adapter_layers import AdapterLayers
from lingualinked.sharded.hooks.recording_order import RecordingOrder
from lingualinked.sharded.hooks.wrapped_modules import WrappedModules, fill_empty, runs_here, wrapper_of
from lingualinked.sharded.sealed.stand_in_class import make_stand_in
from lingualinked.sharded.sealed.unsupported import refusal
from lingualinked.sharded.weights.fetched_weights import FetchedWeights
from lingualinked.sharded.weights.remote_tensor import RemoteTensor

_CHANGE = "its layers run in the workers; change the checkpoint with transformers first, then load it sharded"
_WRAPPED = "a layer has an adapter layer of peft around it, or another wrapper, and not both"
_GRADIENTS = "no gradients flow through it; train the unsharded model"
_USE = "its weights are in workers; copy.deepcopy() its parts one by one, or load it unsharded with transformers"
_DECODER = "its layers run in the workers; call the whole model, with output_hidden_states=True for what enters and leaves layers"

_REGISTRIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
_SHADOWED = ("_buffers", "_modules", "_parameters")  # an attribute of the same name shadows their entries
_OF_THE_SEAL = (
    "_adapters",
    "_computed",
    "_free",
    "_path",
    "_recording",
    "_sealed",
    "_surgery",
    "_wrapped",
    "_wrapper",
)  # not of a module elsewhere
_SCALARS = (bool, int, float, str)
_OF_THE_CALLER = ("loss_type", "name_or_path")
_ABSENT = object()


class SealedDict(dict[str, Any]):
    """A read-only registry of a module: its parameters, submodules or hooks."""

    def __init__(self, content: dict[str, Any], path: str, registry: str) -> None:
        super().__init__(content)
        self._path, self._registry = path, registry

    def __setitem__(self, key: str, value: Any) -> None:
        if self.get(key, _ABSENT) is not value:
            self._refuse(key)

    def _refuse(self, *given: Any, **_: Any) -> NoReturn:
        reason = _reason(self._registry)
        is_named = reason is _CHANGE and given and isinstance(given[0], str)
        name = given[0] if is_named else self._registry
        raise UnsupportedOperationError(
            f"changing {'.'.join(filter(None, (self._path, name)))} of a sharded model: {reason}"
        )

    __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


class _Running(threading.local):
    """Modules that a step stopped at in this thread, with what stands for their forward; None for one that is called here.

    ``wrapped`` are those of them that their wrappers have yet to call.
    """

    def __init__(self) -> None:
        self.forwards: list[tuple[nn.Module, Callable[..., Any]] | None] = []
        self.wrapped: list[tuple[nn.Module, Callable[..., Any]]] = []


_running = _Running()


def call_hooks_around(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make torch call a sealed module's hooks, and what wraps it or its forward, around a function that stands for it."""
    wrapper = wrapper_of(module)
    if wrapper is None:
        return _call_with((module, forward), module, args, kwargs)
    wrapped = _running.wrapped
    wrapped.append((module, forward))
    num_wrapped = len(wrapped)
    try:
        return _call_with(None, wrapper, args, kwargs)
    finally:
        del wrapped[num_wrapped - 1 :]  # if the wrapper has not called it


def _call_with(
    running: tuple[nn.Module, Callable[..., Any]] | None, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> Any:
    forwards = _running.forwards
    forwards.append(running)
    num_forwards = len(forwards)
    try:
        call = nn.Module.__call__ if isinstance(module, SealedModule) else type(module).__call__
        return call(module, *args, **kwargs)
    finally:
        del forwards[num_forwards - 1 :]  # if a hook before it has raised


def _no_surgery() -> None:
    """Stand for the reference of a list that is not that of the layers."""


class SealedModule:
    """Mixin for the class of every submodule; comes before the real class."""

    if TYPE_CHECKING:
        _computed: set[str]
        _path: str
        _sealed: frozenset[str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run its forward pass in this process, with weights that are fetched one by one; refuse to run the decoder so.

        If its wrapper calls it, which runs in its place in a step, the stage runs it.
        """
        module, wrapped = cast("nn.Module", self), _running.wrapped
        if wrapped and wrapped[-1][0] is module:
            return _call_with(wrapped.pop(), module, args, kwargs)
        if isinstance(self, PreTrainedModel):
            self._refuse("calling", _DECODER)
        return _call_with(None, module, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Accept the current value, another ``forward``, and new attributes of the user's own, which no forward pass reads.

        And what transformers' generation keeps in a module between calls, such as how far pictures shift positions: the stages
        compute that for themselves.
        """
        held = getattr(self, name, _ABSENT)
        if held is value or (isinstance(value, _SCALARS) and type(held) is type(value) and held == value):
            return
        if name == "forward" and callable(value) and name not in self._sealed:
            if getattr(value, "__func__", None) is type(self).forward and value.__self__ is self:  # type: ignore[attr-defined]
                vars(self).pop(name, None)  # its own again
            else:
                object.__setattr__(self, name, value)
            return
        if self._keeps_computed(name, held, value, sys._getframe(1).f_globals["__name__"]):  # noqa: SLF001 - of who sets it
            return
        surgery = vars(held).get("_surgery", _no_surgery)() if isinstance(held, nn.ModuleList) else None
        if surgery is not None and isinstance(value, nn.ModuleList):
            if not set_wrapper(self, self._path, name, value):
                surgery.adopt(self, name, value)
            return
        if name in self._sealed or hasattr(type(self), name) or isinstance(value, nn.Parameter | nn.Module):
            if set_wrapper(self, self._path, name, value):
                return
            wraps = isinstance(value, nn.Module) and isinstance(held, nn.Module) and held in value.modules()
            self._refuse(f"setting {name} of", _WRAPPED if wraps else _CHANGE)
        object.__setattr__(self, name, value)

    def _keeps_computed(self, name: str, held: Any, value: Any, setter: str) -> bool:
        """Keep a tensor that the model's own code sets where there was none; return whether it is one."""
        computed: set[str] = vars(self)["_computed"]
        is_own = name in vars(self) and (held is None or name in computed) and setter.startswith("transformers.models.")
        if is_own and type(value) is Tensor:
            computed.add(name)
            object.__setattr__(self, name, value)
            return True
        return False

    def register_forward_hook(self, hook: Callable[..., Any], *, prepend: bool = False, **options: bool) -> Any:
        """Register a hook as torch does, and note whether it runs before what records outputs."""
        handle = super().register_forward_hook(hook, prepend=prepend, **options)  # type: ignore[misc]
        vars(self)["_recording"].add(handle.id, is_first=prepend)
        return handle

    def __delattr__(self, name: str) -> None:
        wrapped: WrappedModules | None = vars(self).get("_wrapped")
        if wrapped is not None and wrapped.remove_empty(cast("nn.Module", self), name):
            return
        if name in self._sealed or name not in vars(self):
            self._refuse(f"deleting {name} of", _CHANGE)
        object.__delattr__(self, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Return an ordinary module of this process with the same weights; refuse to copy the decoder so."""
        if isinstance(self, PreTrainedModel):
            self._refuse("copying", _USE)
        real: Any = type(self).__bases__[1]
        copied = memo[id(self)] = real.__new__(real)
        for name, value in vars(self).items():
            if name not in _OF_THE_SEAL:
                held = dict(value) if isinstance(value, SealedDict) else value
                vars(copied)[name] = copy.deepcopy(held, memo)
        return cast("nn.Module", copied)

    def __reduce_ex__(self, _: Any) -> NoReturn:
        self._refuse("copying or pickling", _USE)

    def _refuse(self, what: str, reason: str) -> NoReturn:
        raise UnsupportedOperationError(f"{what} {self._path} ({type(self).__name__}) of a sharded model: {reason}")


class SealedModel:
    """Mixin for the class of the whole model, whose own ``forward`` runs in this process and can be hooked."""

    _sealed: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if set_wrapper(self, "", name, value):
            return
        if name in self._sealed:
            held = vars(self).get(name)
            if type(held) is not type(value) or held != value:
                raise UnsupportedOperationError(f"setting {name}={value!r} of a sharded model: {_CHANGE}")
        super().__setattr__(name, value)


def set_wrapper(module: Any, path: str, name: str, value: object) -> bool:
    """Replace a submodule by what wraps it, or the reverse; return False if this is something else."""
    modules = vars(module).get("_modules", {})
    held, layers = modules.get(name), vars(module).get("_adapters")
    if layers is None or held is None or not isinstance(value, nn.Module):
        return False
    wrapped: WrappedModules = vars(module)["_wrapped"]
    if not layers.layers and not type(value).__module__.startswith("peft."):
        return wrapped.replace(module, path, name, value)
    if wrapped.wrapped:
        return False
    if not layers.replace(f"{path}.{name}" if path else name, held, value):
        return False
    dict.__setitem__(modules, name, value)
    if not isinstance(value, SealedModule):  # else it is what was wrapped
        value.__class__ = _adapter_class(cast("Any", type(value)))
    return True


def _reason(name: str) -> str:
    if "backward" in name:
        return _GRADIENTS
    if "state_dict" in name:
        return _USE
    return _CHANGE


def _registration(name: str) -> Callable[..., Any]:
    """Return a method that registers a submodule, parameter or buffer: it accepts what is registered already."""
    refuse = refusal(name, _CHANGE)
    registry = {"register_buffer": "_buffers", "register_parameter": "_parameters"}.get(name, "_modules")

    def register(self: nn.Module, name: str, value: Any, *_: Any, **__: Any) -> None:
        is_held = vars(self)[registry].get(name, _ABSENT) is value
        if not is_held and not (registry == "_buffers" and fill_empty(self, name, value)):
            refuse(self)

    register.__name__, register.__doc__ = name, f"Accept what holds already. {refuse.__doc__}"
    return register


_REGISTRATIONS = ("add_module", "register_buffer", "register_module", "register_parameter")
for _name in dir(nn.Module):
    if _name.startswith(("add_", "register_")) and not _name.startswith("register_forward_"):
        _method = _registration(_name) if _name in _REGISTRATIONS else refusal(_name, _reason(_name))
        setattr(SealedModule, _name, _method)
        setattr(SealedModel, _name, _method)
for _name, _why in {"compile": _CHANGE, "load_state_dict": _CHANGE}.items():
    setattr(SealedModule, _name, refusal(_name, _why))


@functools.cache  # one class per real one: types of two modules of a kind are equal
def sealed_class(real: Any, base: type[SealedModule] = SealedModule) -> Any:
    """Return a subclass of ``base`` and ``real`` with the name of ``real``."""
    sealed = make_stand_in(
        real,
        (base, real),
        {
            "__qualname__": real.__qualname__,
            # Modules that torch creates from this class, such as a slice of a list, do not belong to the model.
            "__new__": lambda _, *args, **kwargs: real(*args, **kwargs),
        },
    )
    sealed.forward = _awaited_forward(real)  # not before: transformers wraps the forward of a new class of layers
    return sealed


@functools.cache
def _adapter_class(real: Any) -> Any:
    """Return a subclass of an adapter layer's class whose forward a step may stand for, but which is not sealed."""
    namespace = {"__module__": real.__module__, "__qualname__": real.__qualname__, "real_class": real}
    return type(real.__name__, (real,), {**namespace, "forward": _awaited_forward(real)})


def _awaited_forward(real: Any) -> Callable[..., Any]:
    """Return a forward that a step stands for which has stopped at the module."""
    own = real.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = _running.forwards[-1] if _running.forwards else None
        # Called by torch, or by what replaces the module's forward; not by a hook.
        is_awaited = sys._getframe(1).f_globals is vars(nn_module) or "forward" in vars(self)  # noqa: SLF001
        # A function that was made from this one around another than the class's own runs in this process.
        is_stages = own is real.forward and not runs_here(self)
        if running is not None and running[0] is self and is_awaited and is_stages:
            _running.forwards.pop()
            return running[1](*args, **kwargs)
        return own(self, *args, **kwargs)

    return forward


class Seal:
    """The modules of a model as they were when it was sealed.

    Sealing turns parameters and buffers of a model on the meta device into `RemoteTensor`, and makes its submodules
    read-only.
    """

    def __init__(self, model: PreTrainedModel, weights: FetchedWeights) -> None:
        # With the originals, since ids are unique only among living objects.
        remote: dict[int, tuple[Tensor, RemoteTensor]] = {}

        def replace(value: Any, name: str) -> Any:
            if isinstance(value, Tensor) and id(value) not in remote:
                remote[id(value)] = value, RemoteTensor.of(value, name, weights.fetch_of(value, name), weights.editor)
            return remote[id(value)][1] if isinstance(value, Tensor) else value

        self._states: list[tuple[nn.Module, dict[str, Any]]] = []
        self.adapters = AdapterLayers()
        self.wrapped, self.recording = WrappedModules(), RecordingOrder(recorded_modules(model))
        # Not owned by modules: a circle would keep the model until the collector runs.
        shared = {f"_{name}": weakref.proxy(getattr(self, name)) for name in ("adapters", "wrapped", "recording")}
        for path, module in list(model.named_modules()):
            state, prefix = vars(module), f"{path}." if path else ""
            for key, value in list(state.items()):
                if key not in _REGISTRIES:
                    state[key] = replace(value, f"{prefix}{key}")
                elif not key.startswith("_forward_"):
                    content = {each: replace(held, f"{prefix}{each}") for each, held in value.items()}
                    state[key] = SealedDict(content, path, key)
            state.update(shared)
            self.wrapped.add(module)
            if module is model:
                state["_sealed"] = frozenset(name for name, value in state.items() if _is_setting(name, value))
                self._registries = {key: state[key] for key in _REGISTRIES}
            else:
                state["_computed"] = set()
                state["_path"], state["_sealed"] = path, frozenset(state)
                object.__setattr__(module, "__class__", sealed_class(cast("Any", type(module))))
                self._states.append((module, dict(state)))

    def check(self, model: nn.Module) -> None:
        """Check that no change has bypassed the modules' ``__setattr__``; the model refers to this seal, not the reverse."""
        _check(model, self._registries)
        self.wrapped.check()
        for module, sealed in self._states:
            if module.__dict__ != sealed:
                _check(module, sealed)


def _check(module: nn.Module, sealed: Mapping[str, Any]) -> None:
    """Refuse every difference from the sealed state except a user's own attributes."""
    state, is_submodule = vars(module), isinstance(module, SealedModule)
    computed = state.get("_computed", ())
    changed = [name for name, value in sealed.items() if state.get(name, _ABSENT) is not value and name not in computed]
    if is_submodule:
        changed += [name for name in state.keys() - sealed.keys() - {"forward"} if hasattr(type(module), name)]
    changed += [name for registry in _SHADOWED for name in sealed[registry].keys() & state.keys()]
    if changed:
        where = f"{state['_path']}." if is_submodule else ""
        raise UnsupportedOperationError(
            f"{where}{changed[0]} of a sharded model has been changed, which has no effect: {_CHANGE}; or set it back"
        )


def _is_setting(name: str, value: object) -> bool:
    """Return whether an attribute of the whole model may influence a forward pass in the workers."""
    return not name.startswith("_") and name not in _OF_THE_CALLER and isinstance(value, (*_SCALARS, type(None)))

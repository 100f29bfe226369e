"""Stops a stage's forward pass at hooked modules, and goes on with what their hooks have made of the call.

Knows torch's hooks and the stage's own modules; neither messages nor the functions that are called.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from typing import TYPE_CHECKING, Any, Self

from lingualinked.model.cutting.cut import StandIn
from lingualinked.model.hf_internals.recording import record_first
from lingualinked.model.hooks.hook_values import CallValues

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from lingualinked.model.hooks.hook_data import Cut, HookPoint


@dataclasses.dataclass(slots=True)
class ModuleCall:
    """One call of a hooked module, as it stands: before the module has run, or behind it.

    A hook may replace ``args``, ``kwargs`` and ``output``, and give an output of a module that then does not run.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    is_done: bool = False  # whether the module has run
    may_skip: bool = False
    is_skipped: bool = False
    sends_inputs: bool = True  # whether the caller still needs to know what the module was called with
    waits_for_output: bool = False  # whether the caller awaits the output of a call whose inputs it knows
    cut: Cut | None = None  # what of it hooks want, if not all
    values: CallValues = dataclasses.field(default_factory=CallValues)


def contains_layers(path: str, layers: str) -> bool:
    """Return whether a module runs the layers, which several stages hold: the decoder, in most models."""
    return f"{layers}.".startswith(f"{path}.")


class _SkippableForward:
    """Stands for a module's forward while there are passes that may skip it: one thread at a time runs."""

    def __init__(self, module: nn.Module) -> None:
        self.outputs: dict[int, Any] = {}  # of the threads that skip it now
        self.num_passes = 0
        self._module = module
        self._own = vars(module).get("forward")
        self._forward = module.forward

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Return the one of a module, for one more pass."""
        held = vars(module).get("forward")
        skippable = held if isinstance(held, cls) else cls(module)
        vars(module)["forward"] = skippable
        skippable.num_passes += 1
        return skippable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        return self.outputs.pop(thread) if thread in self.outputs else self._forward(*args, **kwargs)

    def remove(self) -> None:
        """Put the module's forward back in its place once no pass may skip it."""
        self.num_passes -= 1
        if not self.num_passes:
            del vars(self._module)["forward"]
            if self._own is not None:
                vars(self._module)["forward"] = self._own


class HookedPass:
    """The torch hooks of one forward pass in this thread: they stop it at the modules of some points.

    Other threads' passes through the same modules go on. They may call these hooks even after they were removed, and then
    without keyword arguments.
    """

    def __init__(
        self, model: nn.Module, layers: str, points: Iterable[HookPoint], pause: Callable[[ModuleCall], Any]
    ) -> None:
        held = [not isinstance(layer, StandIn) for layer in model.get_submodule(layers).children()]
        self._model, self._layers = model, layers
        self._is_first, self._is_last = held[0], held[-1]
        self._pause = pause
        self._thread = threading.get_ident()
        self._points: dict[str, HookPoint] = {}
        self._handles: dict[str, list[Any]] = {}
        self._skippable: dict[str, _SkippableForward] = {}
        self._calls: list[ModuleCall] = []  # of modules that are running, the innermost last
        self._is_stopped = False
        self._set_points(points)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (*itertools.chain(*self._handles.values()), *self._skippable.values()):
            handle.remove()

    def _set_points(self, points: Iterable[HookPoint]) -> None:
        """Stop at these points from now on, and at no others."""
        self._points = {point.path: point for point in points}
        for path, point in self._points.items():
            module = self._module_at(path)
            if path not in self._handles:
                self._handles[path] = [] if module is None else self._install(path, module)
            if point.may_skip and path not in self._skippable and module is not None:
                self._skippable[path] = _SkippableForward.of(module)
        self._record_first()

    def _record_first(self) -> None:
        """Record what some modules return before hooks change it."""
        for path, point in self._points.items():
            if point.behind_records and (module := self._module_at(path)) is not None:
                record_first(module)

    def _module_at(self, path: str) -> nn.Module | None:
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            return None  # another stage has it
        return None if isinstance(module, StandIn) else module

    def _install(self, path: str, module: nn.Module) -> list[Any]:
        spans = contains_layers(path, self._layers)
        handles = []
        if self._is_first or not spans:
            # First, as below: interventions see what hooks have made of the inputs.
            handles.append(module.register_forward_pre_hook(self._make_before(path), with_kwargs=True, prepend=True))
        if self._is_last or not spans:
            # First, since what sends outputs on is to see what hooks have made of them; so is what records them, mostly.
            after = self._make_after(path, spans=spans)
            handles.append(module.register_forward_hook(after, with_kwargs=True, prepend=True))
        return handles

    def _make_before(self, path: str) -> Callable[..., Any]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if kwargs is None or not self._is_here() or path not in self._points or not self._points[path].before:
                return None
            point = self._points[path]
            call = ModuleCall(path, args, kwargs, may_skip=path in self._skippable, cut=point.cut_before)
            if call.cut is None:
                self._calls.append(call)
            self._stop(call)
            if call.is_skipped:
                self._skippable[path].outputs[self._thread] = call.output
            return call.args, call.kwargs

        return before

    def _make_after(self, path: str, *, spans: bool) -> Callable[..., Any]:
        def after(_module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
            if len(rest) < 2 or not self._is_here():
                return None
            kwargs, output = rest
            call = ModuleCall(path, args, kwargs, sends_inputs=not spans)
            if self._calls and self._calls[-1].path == path:
                call = self._calls.pop()
                call.sends_inputs = False
                if not call.waits_for_output:
                    return None
            elif path not in self._points or not self._points[path].after:
                return None
            else:
                call.cut = self._points[path].cut_after
            call.output, call.is_done = output, True
            self._stop(call)
            return call.output

        return after

    def _is_here(self) -> bool:
        return not self._is_stopped and threading.get_ident() == self._thread

    def _stop(self, call: ModuleCall) -> None:
        self._is_stopped = True
        points = self._pause(call)
        self._is_stopped = False
        self._record_first()  # recorders were attached anew
        if points is not None:
            self._set_points(points)


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Make a hook do nothing in other threads, whose forward passes may use the same modules."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None

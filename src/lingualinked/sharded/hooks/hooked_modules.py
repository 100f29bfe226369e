"""Which submodules of a model have hooks, another forward or a wrapper, and where a step has to stop for them.

Knows modules, torch's registries of hooks and the parts of a model; neither steps nor what hooks are given.
"""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING, Any

from lingualinked.model.hooks.hook_data import Cut, HookPoint
from lingualinked.model.hooks.hook_points import contains_layers
from lingualinked.sharded.adapters.adapter_layers import is_of_peft
from lingualinked.sharded.hooks.narrow_hooks import NarrowHook, narrow_hooks
from lingualinked.sharded.hooks.wrapped_modules import runs_here, wrapper_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import nn

    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.sharded.adapters.adapter_layers import AdapterLayers
    from lingualinked.sharded.hooks.recording_order import RecordingOrder

_BEFORE, _BEHIND, _ALWAYS = "_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"


class HookedModules:
    """The submodules of a model that may have hooks, or a function that replaces their forward; true if one has."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parts: ModelParts,
        adapters: AdapterLayers,
        wrapped: Collection[int],
    ) -> None:
        self.num_changes = adapters.num_changes  # of the modules
        self.modules = modules  # of the model without adapters, by path
        self.by_path = {**modules, **adapters.layers}
        self.by_path |= {f"{path}.base_layer": modules[path] for path in adapters.layers}
        self._wrapped = wrapped
        self.layers = parts.layers
        self._parts = parts
        self._in_one_stage = (parts.layers, *parts.prologue, *parts.epilogue)
        self._states = [vars(module) for module in self.by_path.values()]
        self._before: list[Mapping[int, Any]] = [state[_BEFORE] for state in self._states]
        self._behind: list[Mapping[int, Any]] = [state[_BEHIND] for state in self._states]
        self._adapter_layers = frozenset(adapters.layers)

    def __bool__(self) -> bool:
        if self._wrapped:
            return True
        has_some = any(self._before) or any(self._behind) or any(True for _ in self._wrapped_paths())
        return has_some and (not self._adapter_layers or bool(self.points()))  # which peft itself hooks

    def points(self) -> tuple[HookPoint, ...]:
        """Return where a step has to stop."""
        hooked = itertools.chain(
            itertools.compress(self.by_path, self._before),
            itertools.compress(self.by_path, self._behind),
            self._wrapped_paths(),
        )
        return tuple(
            self._narrow_point(path)
            or HookPoint(path, self._stops_before(path), self.stops_after(path), self._is_wrapped(path))
            for path in dict.fromkeys(hooked)
            if self._hooks_before(path) or self._has(path, _BEHIND) or self._is_wrapped(path)
        )

    def in_order(self, points: Iterable[HookPoint], recording: RecordingOrder) -> tuple[HookPoint, ...]:
        """Say of points whether their hooks run once transformers has recorded what the modules return."""
        return tuple(
            HookPoint(point.path, point.before, point.after, point.may_skip, behind_records=True)
            if recording.are_behind(point.path, vars(self.by_path[point.path])[_BEHIND])
            else point
            for point in points
        )

    def layer_at(self, path: str) -> int | None:
        """Return the number of the layer that a path is of, None if it is of something else."""
        layer = self._parts.layer_of(f"{path}.weight")
        return layer if path == f"{self.layers}.{layer}" else None

    def _wrapped_paths(self) -> Iterable[str]:
        """Return the paths of modules of which `_is_wrapped` holds: quickly, since every step asks."""
        has_forward = map(operator.contains, self._states, itertools.repeat("forward"))
        candidates = self.by_path if self._wrapped else itertools.compress(self.by_path, has_forward)
        return filter(self._is_wrapped, candidates)

    def _narrow_point(self, path: str) -> HookPoint | None:
        """Return where a step has to stop for hooks that all want the same part of a call, if these do."""
        before, behind = self._hooks_before(path), vars(self.by_path[path])[_BEHIND]
        narrow = [narrow_hooks(hooks) for hooks in (before, behind)]
        if [*map(len, narrow)] != [len(before), len(behind)]:
            return None
        if self._is_wrapped(path) or contains_layers(path, self.layers) or self.runs_everywhere(path):
            return None
        if any(len({hook.positions for hook in hooks}) > 1 for hooks in narrow):
            return None
        cuts = [Cut(hooks[0].positions, any(hook.wants_both for hook in hooks)) if hooks else None for hooks in narrow]
        return HookPoint(path, bool(before), bool(behind), cut_before=cuts[0], cut_after=cuts[1])

    def narrow_hooks(self, path: str, cut: Cut, *, is_done: bool) -> list[NarrowHook]:
        """Return the hooks before a module, or behind it, that want this part of its call."""
        hooks = narrow_hooks(vars(self.by_path[path])[_BEHIND if is_done else _BEFORE])
        return [hook for hook in hooks if hook.positions == cut.positions and cut.with_input >= hook.wants_both]

    def _hooks_before(self, path: str) -> Mapping[int, Any]:
        """Return the hooks before a module, without those by which peft tells its layers the adapters of rows."""
        hooks: Mapping[int, Any] = vars(self.by_path[path])[_BEFORE]
        if path in self._adapter_layers:
            return {number: hook for number, hook in hooks.items() if not is_of_peft(hook)}
        return hooks

    def _has(self, path: str, registry: str) -> bool:
        return bool(vars(self.by_path[path])[registry])

    def _is_wrapped(self, path: str) -> bool:
        """Return whether a function of the user's replaces a module's forward, or a module wraps it, which may call it or not."""
        module = self.by_path[path]
        state = vars(module)
        return ("forward" in state and _acts(state["forward"])) or wrapper_of(module) is not None or runs_here(module)

    def _stops_before(self, path: str) -> bool:
        is_asked_for = bool(self._hooks_before(path)) or self._has(path, _ALWAYS) or self._is_wrapped(path)
        return is_asked_for or contains_layers(path, self.layers)

    def stops_after(self, path: str) -> bool:
        """Return whether a step has to stop behind a module that has hooks."""
        return self._has(path, _BEHIND) or self._is_wrapped(path) or self.runs_everywhere(path)

    def runs_everywhere(self, path: str) -> bool:
        """Return whether every stage runs a module for itself, such as what computes positions."""
        return not (contains_layers(path, self.layers) or _is_within(path, self._in_one_stage))

    def may_stop(self, path: str, spans: Sequence[tuple[str, int, int]], stage: int, *, is_done: bool) -> bool:
        """Return whether a step may stop at a module on this stage of a plan, before the module or behind it."""
        if path not in self.by_path:
            return False
        layer = self._parts.layer_of(f"{path}.weight")
        if layer is not None:
            _, start, end = spans[stage]
            return start <= layer < end
        if contains_layers(path, self.layers):
            return stage == (len(spans) - 1 if is_done else 0)
        prologue = self._parts.prologue if stage == 0 else ()
        epilogue = self._parts.epilogue if stage == len(spans) - 1 else ()
        return self.runs_everywhere(path) or _is_within(path, (*prologue, *epilogue))


def _acts(forward: object) -> bool:
    """Return whether a function in place of a module's forward may do more than to call it: nnsight's do while it traces."""
    if type(forward).__module__ != "nnsight.intervention.source":
        return True
    active = getattr(getattr(forward, "state", None), "active", None)
    return active is None or active()[0] is not None


def _is_within(path: str, others: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in others)

"""An unsharded model with `capture` and `intervene` as their documentation states them: by torch's own hooks.

Knows the expressions that a user would write in a hook; nothing of how the library makes them.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lingualinked as ll


def first(value: Any) -> Tensor:
    """Return the first tensor of what a module is called with or returns."""
    if isinstance(value, Tensor):
        return value
    return next(each for each in (value.values() if isinstance(value, dict) else value) if isinstance(each, Tensor))


def with_first(value: Any, changed: Tensor) -> Any:
    if isinstance(value, Tensor):
        return changed
    index = next(index for index, each in enumerate(value) if isinstance(each, Tensor))
    return (*value[:index], changed, *value[index + 1 :])


def changed(intervention: Any, values: Tensor) -> Tensor:
    """Return what the class of an intervention says that it makes of values."""
    match intervention:
        case ll.Add(vector=vector):
            return values + vector.to(values)
        case ll.Replace(value=value):
            return value.to(values).expand_as(values)
        case ll.Scale(factor=factor):
            return values * (factor.to(values) if isinstance(factor, Tensor) else factor)
        case ll.Ablate(mean=mean):
            return torch.zeros_like(values) if mean is None else mean.to(values).expand_as(values)
        case ll.Project(basis=basis, mode=mode):
            part = ((values.to(basis.dtype) @ basis) @ basis.T).to(values.dtype)
            return part if mode == "keep" else values - part
        case ll.Clamp(low=low, high=high, unit=None):
            return values.clamp(low, high)
        case ll.Clamp(low=low, high=high, unit=unit):
            along = values.to(unit.dtype) @ unit
            return values + ((along.clamp(low, high) - along)[..., None] * unit).to(values.dtype)
    raise AssertionError


class ByHooks:
    """The unsharded model; other attributes are its own."""

    def __init__(self, model: Any) -> None:
        self.model_itself = model
        self._past = self._num_rows = self._num_new = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model_itself, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model_itself(*args, **kwargs)

    @contextlib.contextmanager
    def intervene(self, interventions: Any, **_: Any) -> Iterator[None]:
        with contextlib.ExitStack() as handles:
            handles.enter_context(self._counting())
            for pattern, given in interventions.items():
                for each in given if isinstance(given, list) else [given]:
                    for path in self._paths(pattern):

                        def change(states: Tensor, each: Any = each) -> Tensor | None:
                            return self._change(each, states)

                        handles.enter_context(self._register(path, each.what, change))
            yield

    @contextlib.contextmanager
    def capture(
        self,
        modules: Any,
        *,
        what: str = "output",
        positions: Any = None,
        rows: Any = None,
        steps: str = "all",
        dtype: Any = None,
        reduce: str | None = None,
        **_: Any,
    ) -> Iterator[dict[str, list[Tensor]]]:
        kept: dict[str, list[Tensor]] = {}
        with contextlib.ExitStack() as handles:
            handles.enter_context(self._counting())
            for pattern in [modules] if isinstance(modules, str) else modules:
                for path in self._paths(pattern):
                    kept[path] = []

                    def keep(states: Tensor, values: list[Tensor] = kept[path]) -> None:
                        index = self._index(rows, positions, steps)
                        if index is None:
                            return
                        chosen = states if rows is None and positions is None else states[index]
                        chosen = chosen if dtype is None else chosen.to(dtype)
                        if reduce in ("mean", "sum"):
                            chosen = getattr(chosen, reduce)(1, keepdim=True)
                        elif reduce == "norm":
                            chosen = chosen.norm(dim=-1)
                        elif reduce == "last":
                            chosen = chosen[:, -1:]
                        values.append(chosen.clone())

                    handles.enter_context(self._register(path, what, keep))
            yield kept

    def _paths(self, pattern: str) -> list[str]:
        names = pattern.split(".")
        return [
            path
            for path, _ in self.model_itself.named_modules()
            if len(path.split(".")) == len(names) and all(map(fnmatch.fnmatchcase, path.split("."), names))
        ]

    def _register(self, path: str, what: str, use: Callable[[Tensor], Tensor | None]) -> Any:
        module = self.model_itself.get_submodule(path)
        if what == "output":

            def after(_module: Any, _args: Any, output: Any) -> Any:
                made = use(first(output))
                return None if made is None else with_first(output, made)

            return module.register_forward_hook(after)

        def before(_module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                made = use(first(args))
                return None if made is None else (with_first(args, made), kwargs)
            name = next(name for name, each in kwargs.items() if isinstance(each, Tensor))
            made = use(kwargs[name])
            return None if made is None else (args, {**kwargs, name: made})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def _counting(self) -> Any:
        def count(_module: Any, args: Any, kwargs: Any) -> None:
            past = kwargs.get("past_key_values")
            given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            self._past = 0 if past is None else int(past.get_seq_length())
            self._num_rows, self._num_new = given.shape[:2]

        return self.model_itself.register_forward_pre_hook(count, with_kwargs=True)

    def _change(self, intervention: Any, states: Tensor) -> Tensor | None:
        index = self._index(intervention.rows, intervention.positions, intervention.steps)
        if index is None:
            return None
        if intervention.rows is None and intervention.positions is None:
            return changed(intervention, states)
        states = states.clone()
        states[index] = changed(intervention, states[index])
        return states

    def _index(self, rows: Any, positions: Any, steps: str) -> tuple[Tensor, Tensor] | None:
        if steps != "all" and (steps == "prefill") != (self._past == 0):
            return None
        chosen_rows = torch.arange(self._num_rows)[slice(None) if rows is None else rows].reshape(-1)
        if isinstance(positions, Tensor):
            columns = [self._columns(each.tolist()) for each in positions]
        else:
            columns = [self._columns(positions)]
        return (chosen_rows[:, None], torch.tensor(columns)) if columns[0] else None

    def _columns(self, positions: Any) -> list[int]:
        past, new = self._past, self._num_new
        if positions is None:
            return list(range(new))
        if isinstance(positions, slice):
            if (positions.start or 0) < 0:
                return list(range(new))[positions]
            return [each - past for each in range(past + new)[positions] if each >= past]
        listed = [positions] if isinstance(positions, int) else positions
        columns = [each - past if each >= 0 else each + new for each in listed]
        return [each for each in columns if 0 <= each < new]

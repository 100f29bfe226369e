"""Turns the arguments of `ShardedModel.capture` and `ShardedModel.intervene` into the data of a block, or refuses them.

Knows what users may pass and what modules compute; not when a block is in force.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import Cache

from lingualinked.checks import as_index
from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.interventions import Ablate, Add, Clamp, Intervention, Project, Replace, Scale
from lingualinked.model.hooks.instrument_data import Capture, Change, ChangeKind, Choice, Dtype, Reduction, Side, Steps
from lingualinked.sharded.instruments.captured import Captured
from lingualinked.sharded.instruments.in_force import Block, InstrumentBlock, ListedPositions, Result
from lingualinked.sharded.instruments.module_calls import find_calls, match_modules
from lingualinked.sharded.instruments.retained import RetainingBlock
from lingualinked.sharded.instruments.step_shapes import check_change, check_has_tokens
from lingualinked.units import parse_bytes

Scope = Literal["model", "thread"]


def capture_block(
    model: Any,
    modules: str | Sequence[str],
    *,
    what: object,
    positions: object,
    rows: object,
    steps: object,
    dtype: object,
    reduce: object,
    scope: object,
    max_bytes: int | str,
    retain_grad: bool,
) -> InstrumentBlock[Captured] | RetainingBlock:
    """Check the arguments of `ShardedModel.capture`, and return its block."""
    side = _check_name(what, Side, "what")
    chosen_rows, chosen_positions = as_choice(rows, "rows"), as_choice(positions, "positions")
    reduction = None if reduce is None else _check_name(reduce, Reduction, "reduce")
    in_steps = _check_name(steps, Steps, "steps")
    sent_dtype = None if dtype is None else _check_name(str(dtype).removeprefix("torch."), Dtype, "dtype")
    calls, known = find_calls(model._pipeline.spec), _paths(model)  # noqa: SLF001 - within the room
    patterns = list(modules) if isinstance(modules, Iterable) and not isinstance(modules, str) else [modules]
    paths = {path: known[path] for path in match_modules(patterns, side, calls, known)}
    if not paths:
        raise ArgumentError(f"modules={modules!r} names no submodule: pass at least one path or pattern")
    items = tuple(
        Capture(path, side, chosen_rows, chosen_positions, in_steps, sent_dtype, reduction) for path in paths.values()
    )
    for item in items:
        if reduction is not None or not item.takes_everything:
            check_has_tokens(item, calls[item.path, side])
    captured = Captured(list(paths), parse_bytes(max_bytes, "max_bytes"))
    if retain_grad:
        if not items[0].takes_everything or in_steps != "all" or sent_dtype or reduction or isinstance(scope, Cache):
            raise ArgumentError(
                "retain_grad=True captures tensors of the autograd graph as they are: leave out positions, rows, steps, dtype, "
                "reduce and a KV cache as scope, and choose from what was captured"
            )
        found = {name: (path, model.get_submodule(name)) for name, path in paths.items()}
        of_thread = _check_name(scope, Scope, "scope") == "thread"
        return RetainingBlock(model._pipeline, model._parts, found, side, captured, of_thread=of_thread)  # noqa: SLF001
    shown = {path: name for name, path in paths.items()}
    return _block(
        model, lambda **who: Block(items, (), captured, shown, ListedPositions(items), **who), scope, captured
    )


def intervention_block(model: Any, interventions: object, *, scope: object) -> InstrumentBlock[None]:
    """Check the arguments of `ShardedModel.intervene`, and return its block."""
    if not isinstance(interventions, Mapping) or not interventions:
        raise ArgumentError(
            f"interventions={interventions!r} must map paths of submodules to interventions, as in "
            "{'model.layers.5': lingualinked.Add(vector)}"
        )
    calls, paths, parts = find_calls(model._pipeline.spec), _paths(model), model._parts  # noqa: SLF001 - within the room
    items: list[Change] = []
    tensors: list[Tensor] = []
    learning = ""
    for pattern, given in interventions.items():
        for each in given if isinstance(given, list | tuple) else [given]:
            if not isinstance(each, Intervention) or type(each) is Intervention:
                raise ArgumentError(
                    f"the intervention at {pattern!r} is of type {type(each).__name__}: pass lingualinked.Add, Replace, Scale, "
                    "Ablate, Project or Clamp, or a sequence of them"
                )
            side = _check_name(each.what, Side, "what")
            chosen = as_choice(each.rows, "rows"), as_choice(each.positions, "positions")
            if not learning and any(isinstance(value, Tensor) and value.requires_grad for value in _values_of(each)):
                learning = f"{type(each).__name__} at {pattern!r}"
            kind, own, numbers = _arithmetic(each)
            indices = tuple(range(len(tensors), len(tensors) + len(own)))
            tensors += own
            for path in map(paths.__getitem__, match_modules([pattern], side, calls, paths)):
                change = Change(path, side, *chosen, _check_name(each.steps, Steps, "steps"), kind, indices, numbers)
                check_change(change, own, calls[path, side])
                if parts.is_in_every_stage(path):
                    raise UnsupportedOperationError(
                        f"an intervention at {path}, which every stage runs for itself: register a forward hook there"
                    )
                items.append(change)

    def make(**who: Any) -> Block:
        copies = tuple(torch.Tensor.clone(each.detach().cpu()).as_subclass(torch.Tensor) for each in tensors)
        return Block(tuple(items), copies, None, {}, ListedPositions(items), **who, learning=learning)

    return _block(model, make, scope, None)


def _values_of(intervention: Intervention) -> list[object]:
    return [getattr(intervention, field.name) for field in dataclasses.fields(intervention)]


def _arithmetic(intervention: Intervention) -> tuple[ChangeKind, list[Tensor], tuple[float | None, ...]]:
    """Return the kind of an intervention, and its tensors and numbers."""
    match intervention:
        case Add(vector=vector):
            return "add", [vector], ()
        case Replace(value=value):
            return "replace", [value], ()
        case Ablate(mean=mean):
            return "replace", [torch.zeros(()) if mean is None else mean], ()
        case Scale(factor=factor):
            return ("scale", [factor], ()) if isinstance(factor, Tensor) else ("scale", [], (float(factor),))
        case Project(mode=mode, basis=basis):
            return mode, [basis], ()
        case Clamp(low=low, high=high, unit=unit):
            return (
                "clamp",
                [] if unit is None else [unit],
                tuple(None if each is None else float(each) for each in (low, high)),
            )
    raise ArgumentError(f"{type(intervention).__name__} is not an intervention of this library")


def _block(model: Any, make: Callable[..., Block], scope: object, result: Result) -> InstrumentBlock[Result]:
    cache = scope if isinstance(scope, Cache) else None
    if cache is None and scope not in get_args(Scope):
        raise ArgumentError(f"scope={scope!r} must be 'model', 'thread' or past_key_values")

    def make_block() -> Block:
        return make(thread=threading.get_ident() if scope == "thread" else None, cache=cache)

    return InstrumentBlock(model._open_blocks, make_block, result)  # noqa: SLF001 - within the room


def _paths(model: Any) -> dict[str, str]:
    """Return the paths of submodules, with those by which stages know them: they differ behind a layer that was removed."""
    known = {id(module): path for path, module in model._hooked_modules.by_path.items()}  # noqa: SLF001 - within the room
    return {path: known[id(module)] for path, module in model.named_modules() if path and id(module) in known}


def _check_name(value: object, names: Any, argument: str) -> Any:
    """Return one of the values of a Literal, or raise ArgumentError."""
    if value not in get_args(names):
        raise ArgumentError(f"{argument}={value!r} must be {' or '.join(map(repr, get_args(names)))}")
    return value


def as_choice(value: Any, argument: str) -> Choice:
    """Return which indices a user means."""
    if value is None:
        return Choice()
    try:
        if isinstance(value, slice):
            return _as_slice(value)
        listed: Any = value.tolist() if hasattr(value, "tolist") else value
        listed = listed if isinstance(listed, list | tuple | range) else [listed]
        if listed and isinstance(listed[0], list | tuple | range) and argument == "positions":
            return Choice(None, tuple(tuple(map(as_index, each)) for each in listed))
        if listed:
            return Choice(None, (tuple(map(as_index, listed)),))
    except TypeError:
        pass
    raise ArgumentError(
        f"{argument}={value!r} must be an int of at most 64 bits, a slice with a positive step, a sequence of ints that is not "
        "empty, or None"
    )


def _as_slice(value: slice) -> Choice:
    start, stop, step = (None if each is None else as_index(each) for each in (value.start, value.stop, value.step))
    if step is not None and step < 1:
        raise TypeError
    return Choice((start, stop, step))

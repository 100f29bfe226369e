"""Turns the arguments of `ShardedModel.capture` into the data of a block, or refuses them.

Knows what users may pass and what modules compute; not when a block is in force.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from transformers import Cache

from lingualinked.device import parse_bytes
from lingualinked.errors import ArgumentError
from lingualinked.model.instrument_data import Capture, Choice, Dtype, Reduction, Side, Steps
from lingualinked.sharded.captured import Captured
from lingualinked.sharded.instruments import Block, InstrumentBlock, Result
from lingualinked.sharded.module_calls import ModuleCall, find_calls, match_modules

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
) -> InstrumentBlock[Captured]:
    """Check the arguments of `ShardedModel.capture`, and return its block."""
    side = _check_name(what, Side, "what")
    chosen_rows, chosen_positions = as_choice(rows, "rows"), as_choice(positions, "positions")
    reduction = None if reduce is None else _check_name(reduce, Reduction, "reduce")
    in_steps = _check_name(steps, Steps, "steps")
    sent_dtype = None if dtype is None else _check_name(str(dtype).removeprefix("torch."), Dtype, "dtype")
    calls = find_calls(model._pipeline.spec)  # noqa: SLF001 - within the room
    patterns = [modules] if isinstance(modules, str) else list(modules)
    paths = list(match_modules(patterns, side, calls, _paths(model)))
    if not paths:
        raise ArgumentError(f"modules={modules!r} names no submodule: pass at least one path or pattern")
    items = tuple(Capture(path, side, chosen_rows, chosen_positions, in_steps, sent_dtype, reduction) for path in paths)
    for item in items:
        if reduction is not None or not item.takes_everything:
            _check_has_tokens(item.path, side, calls[item.path, side])
    captured = Captured(paths, parse_bytes(max_bytes, "max_bytes"))
    return _block(model, lambda **who: Block(items, (), captured, **who), scope, captured)


def _block(model: Any, make: Callable[..., Block], scope: object, result: Result) -> InstrumentBlock[Result]:
    cache = scope if isinstance(scope, Cache) else None
    if cache is None and scope not in get_args(Scope):
        raise ArgumentError(f"scope={scope!r} must be 'model', 'thread' or past_key_values")

    def make_block() -> Block:
        return make(thread=threading.get_ident() if scope == "thread" else None, cache=cache)

    return InstrumentBlock(model._open_blocks, make_block, result)  # noqa: SLF001 - within the room


def _paths(model: Any) -> list[str]:
    return [path for path, _ in model.named_modules() if path]


def _check_name(value: object, names: Any, argument: str) -> Any:
    """Return one of the values of a Literal, or raise ArgumentError."""
    if value not in get_args(names):
        raise ArgumentError(f"{argument}={value!r} must be {' or '.join(map(repr, get_args(names)))}")
    return value


def _check_has_tokens(path: str, side: Side, call: ModuleCall) -> None:
    """Raise ArgumentError unless the values there are rows and positions."""
    if not call.has_tokens:
        shape = (
            "differs"
            if call.dimensions is None
            else f"is {['any' if each is None else each for each in call.dimensions]}"
        )
        raise ArgumentError(
            f"rows and positions can't be chosen at the {side} of {path}, whose shape {shape}: leave rows=, positions= and "
            "reduce= out, or choose another module"
        )


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
            return Choice(None, tuple(tuple(map(_index, each)) for each in listed))
        if listed:
            return Choice(None, (tuple(map(_index, listed)),))
    except TypeError:
        pass
    raise ArgumentError(
        f"{argument}={value!r} must be an int, a slice with a positive step, a sequence of ints that is not empty, or None"
    )


def _as_slice(value: slice) -> Choice:
    start, stop, step = (None if each is None else _index(each) for each in (value.start, value.stop, value.step))
    if step is not None and step < 1:
        raise TypeError
    return Choice((start, stop, step))


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)

"""The shapes that captures and interventions have in a step: what is chosen of it, and whether a tensor fits that.

Knows shapes alone, and what modules compute; nothing of steps on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lingualinked.errors import ArgumentError
from lingualinked.model.hooks.instrument_data import Capture, Change, Instrument, positions_in, rows_in
from lingualinked.quantities import count_text
from lingualinked.sharded.instruments.module_calls import Dimension, ModuleCall


def check_has_tokens(item: Instrument, call: ModuleCall) -> None:
    """Raise ArgumentError unless the values there are rows and positions."""
    if not call.has_tokens:
        raise ArgumentError(
            f"rows and positions can't be chosen at the {item.side} of {item.path}, whose shape {_text(call.dimensions)}: "
            "leave rows=, positions= and reduce= out, or choose another module"
        )


def check_change(item: Change, tensors: Sequence[Tensor], call: ModuleCall) -> None:
    """Raise ArgumentError if an intervention can't be made in any step."""
    if not call.is_floating_point:
        raise ArgumentError(f"an intervention at the {item.side} of {item.path}, which is not floating-point")
    if not item.takes_everything:
        check_has_tokens(item, call)
    if call.dimensions is not None:
        _check_fit(item, tensors, (None, None, *call.dimensions[2:]) if call.has_tokens else call.dimensions)


def check_change_in_step(item: Change, tensors: Sequence[Tensor], call: ModuleCall, chosen: tuple[int, int]) -> None:
    """Raise ArgumentError if an intervention can't be made in a step where so many rows and positions are meant."""
    if call.dimensions is not None and call.has_tokens and all(chosen):
        _check_fit(item, tensors, (*chosen, *call.dimensions[2:]))


def _check_fit(item: Change, tensors: Sequence[Tensor], due: tuple[Dimension, ...]) -> None:
    """Raise ArgumentError if an intervention's tensors don't fit values of a shape."""
    for tensor in tensors:
        shape = tuple(tensor.shape)
        if item.kind in ("remove", "keep", "clamp"):  # bases, [hidden, directions], and a direction, [hidden]
            fits = due[-1] in (None, shape[0])
        else:
            pairs = zip(reversed(shape), reversed(due), strict=False)
            fits = len(shape) <= len(due) and all(
                size == 1 or not isinstance(of, int) or size == of for size, of in pairs
            )
        if not fits:
            raise ArgumentError(
                f"a tensor of shape {list(shape)} does not fit what is chosen at the {item.side} of {item.path}, whose shape "
                f"{_text(due)}" + ("" if item.steps != "all" else "; steps='prefill' leaves later steps out")
            )


def _text(dimensions: tuple[Dimension, ...] | None) -> str:
    if dimensions is None:
        return "differs from call to call"
    return "is [" + ", ".join("any" if each is None else str(each) for each in dimensions) + "]"


def count_chosen(item: Instrument, num_rows: int, num_new: int, past: int) -> tuple[int, int]:
    """Return how many rows and positions of a step are meant; raise ArgumentError if some are not in it."""
    try:
        rows, positions = rows_in(item.rows, num_rows), positions_in(item.positions, past, num_new)
    except ArgumentError as error:
        raise ArgumentError(f"at {item.path}: {error}") from error
    if positions and isinstance(positions[0], tuple):
        if len(positions) != len(rows):
            raise ArgumentError(
                f"at {item.path}: positions are given for {count_text(len(positions), 'row')}, and {len(rows)} of the step are chosen"
            )
        return len(rows), len(positions[0])
    return len(rows), len(positions)


def due_shape(
    item: Capture, call: ModuleCall, num_rows: int, num_new: int, chosen: tuple[int, int]
) -> tuple[int | None, ...] | None:
    """Return the shape of what is captured in a step, as far as it is known; an empty one if there is nothing."""
    if item.takes_everything and item.reduction is None:
        sizes: dict[Any, Any] = {"rows": num_rows, "tokens": num_new}
        return None if call.dimensions is None else tuple(sizes.get(each, each) for each in call.dimensions)
    if not all(chosen):
        return ()
    assert call.dimensions is not None
    rest: tuple[Any, ...] = call.dimensions[2:]
    if item.reduction == "norm":
        return *chosen, *rest[:-1]
    return chosen[0], 1 if item.reduction is not None else chosen[1], *rest

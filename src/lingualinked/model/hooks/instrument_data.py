"""Captures and interventions as data: which values of which module, in which steps, and what is done with them.

Knows neither torch nor transformers, which the caller imports later.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lingualinked.errors import ArgumentError
from lingualinked.quantities import count_text

Side = Literal["input", "output"]
Steps = Literal["all", "prefill", "decode"]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Reduction = Literal["mean", "sum", "last", "norm"]
ChangeKind = Literal["add", "replace", "scale", "remove", "keep", "clamp"]

Indices = range | tuple[int, ...]


class Choice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Some indices of a dimension: the bounds of a slice, or lists; one list for all rows, or one for each."""

    bounds: tuple[int | None, int | None, int | None] | None = (None, None, None)
    lists: tuple[tuple[int, ...], ...] = ()

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return self.bounds in ((None, None, None), (0, None, None), (None, None, 1), (0, None, 1))


class _Instrument(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is done at one side of a module, its first tensor there; rows and positions are its first two dimensions."""

    path: str
    side: Side
    rows: Choice
    positions: Choice
    steps: Steps

    @property
    def takes_everything(self) -> bool:
        """Whether all rows and positions are meant, so that a tensor may have any dimensions."""
        return self.rows.is_everything and self.positions.is_everything

    def runs_in(self, past: int) -> bool:
        """Return whether a step counts that has so many tokens before it."""
        return self.steps == "all" or (self.steps == "prefill") == (past == 0)


class Capture(_Instrument, frozen=True, tag=1):
    """Send the values to the caller, in a dtype and reduced over the positions if asked."""

    dtype: Dtype | None
    reduction: Reduction | None


class Change(_Instrument, frozen=True, tag=2):
    """Change the values: by the tensors with these indices among those of all instruments, and by numbers."""

    kind: ChangeKind
    tensors: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    numbers: tuple[float | None, ...]


Instrument = Capture | Change


class Instruments(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The captures and interventions in force, in their order, and how many tensors come with them."""

    items: tuple[Instrument, ...]
    num_tensors: Annotated[int, msgspec.Meta(ge=0)]


def rows_in(choice: Choice, num_rows: int) -> Indices:
    """Return the rows that are meant in a step of so many; raise ArgumentError if one is not there."""
    if choice.bounds is not None:
        return range(num_rows)[slice(*choice.bounds)]
    (rows,) = choice.lists
    for row in rows:
        if not -num_rows <= row < num_rows:
            raise ArgumentError(f"row {row} is not in a step of {count_text(num_rows, 'row')}")
    return tuple(row % num_rows for row in rows)


def positions_in(choice: Choice, past: int, num_new: int) -> Indices | tuple[tuple[int, ...], ...]:
    """Return which tokens of a step of `num_new`, after `past` others, are meant: for all rows, or a tuple for each.

    Positions count from the beginning of the text; negative ones from the end of the step. Those of other steps are left out.
    """
    if choice.bounds is None:
        lists = tuple(tuple(_in_step(each, past, num_new)) for each in choice.lists)
        if len({len(each) for each in lists}) > 1:
            raise ArgumentError(
                f"positions={[list(each) for each in choice.lists]} are of other numbers in each row of a step with the "
                f"positions {past} to {past + num_new - 1}: choose as many for each row"
            )
        return lists[0] if len(lists) == 1 else lists
    start, stop, step = choice.bounds
    step = 1 if step is None else step
    first = 0 if start is None else start
    if first >= 0:
        first -= past
        first += -(first // step) * step if first < 0 else 0  # the first one of the slice that is not before the step
    else:
        first = max(0, num_new + first)
    last = num_new if stop is None else stop - past if stop >= 0 else num_new + stop
    return range(first, max(first, min(last, num_new)), step)


def _in_step(positions: tuple[int, ...], past: int, num_new: int) -> list[int]:
    """Return indices into a step's tokens; raise ArgumentError for one that is before the step, counted from its end."""
    found = []
    for position in positions:
        index = position - past if position >= 0 else position + num_new
        if position < -num_new:
            raise ArgumentError(
                f"position {position} is not in a step of {count_text(num_new, 'token')}, from whose end it counts: "
                "pass steps='prefill', or positions from the beginning of the text, which are not negative"
            )
        if 0 <= index < num_new:
            found.append(index)
    return found

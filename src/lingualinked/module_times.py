"""Measured times of a model's parts in steps of several shapes, and estimates for other shapes.

Plain data; knows neither how it is measured nor what is planned with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from lingualinked.checks import MOST
from lingualinked.errors import ArgumentError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The measured time of one step.

    Parameters
    ----------
    rows, tokens : int
        Shape of the step: rows of the batch, and new tokens per row.
    context : int
        Tokens per row that are in the KV cache before the step.
    seconds : float
        Median of the repeats.
    spread_s : float
        Interquartile range of the repeats.
    """

    rows: int
    tokens: int
    context: int
    seconds: float
    spread_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds", "spread_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"{name}={getattr(self, name)!r} of a step time must be finite and not negative")
        if not (1 <= self.rows <= MOST and 1 <= self.tokens <= MOST and 0 <= self.context <= MOST):
            raise ArgumentError(
                f"rows={self.rows}, tokens={self.tokens}, context={self.context} of a step time must be at least 1, 1 and 0, "
                f"and at most {MOST}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleTimes:
    """The measured times of one part of a model in steps of several shapes.

    Parameters
    ----------
    steps : tuple of StepTime
        At least one; decode steps have one token, prefill steps more.
    """

    steps: tuple[StepTime, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ArgumentError("steps of module times are empty: at least one step must be measured")

    def seconds(self, rows: int, tokens: int, context: float) -> float:
        """Estimate the seconds of a step from the measured ones.

        The estimate is linear in the context for decode steps and in the tokens for prefill steps, then in the rows:
        interpolated between the nearest measured shapes, and extrapolated with their slope. If only one prefill was
        measured, the line goes through the decode step, a pass of one token, so that constant costs are not multiplied by
        the number of tokens. Where prefills of as many tokens were measured at two contexts, each new token takes longer by
        as much for each token before it.

        Parameters
        ----------
        rows, tokens : int
            Shape of the step.
        context : float
            Tokens in the KV cache before it.
        """
        is_decode = tokens == 1
        steps = [step for step in self.steps if (step.tokens == 1) == is_decode] or list(self.steps)
        by_rows = []
        for measured in sorted({step.rows for step in steps}):
            alike = [step for step in steps if step.rows == measured]
            if is_decode:
                seconds = _linear([(step.context, step.seconds) for step in alike], context)
            else:
                one_token = [step for step in self.steps if step.rows == measured and step.tokens == 1]
                seconds = _prefill_s(alike, one_token, tokens, context)
            by_rows.append((measured, seconds))
        return _linear(by_rows, rows)


def _prefill_s(steps: Sequence[StepTime], one_token: Sequence[StepTime], tokens: int, context: float) -> float:
    growth_s = _growth_s(steps)
    by_tokens: dict[int, float] = {}  # as if nothing came before them
    for step in sorted(steps, key=_context, reverse=True):
        by_tokens[step.tokens] = max(0.0, step.seconds - growth_s * step.tokens * step.context)
    if len(by_tokens) == 1 and one_token:
        by_tokens[1] = min(one_token, key=_context).seconds
    return _linear(list(by_tokens.items()), tokens) + growth_s * tokens * context


def _growth_s(steps: Sequence[StepTime]) -> float:
    """Return the seconds that each pair of a new token and one before it adds, by prefills of equal size at different contexts."""
    growth_s, most_pairs = 0.0, 0
    for first, second in itertools.combinations(sorted(steps, key=_context), 2):
        num_pairs = first.tokens * (second.context - first.context)
        if first.tokens == second.tokens > 1 and num_pairs > most_pairs:
            growth_s, most_pairs = max(0.0, (second.seconds - first.seconds) / num_pairs), num_pairs
    return growth_s


def _context(step: StepTime) -> int:
    return step.context


def _linear(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate between points, and extrapolate with the slope of the nearest two, or 0 if it falls at the far end."""
    points = sorted(points)
    if len(points) == 1:
        return points[0][1]
    index = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1 : index + 1]
    if x1 == x0:
        return y0
    slope = (y1 - y0) / (x1 - x0)
    return y1 + max(0.0, slope) * (x - x1) if x > x1 else max(0.0, y0 + slope * (x - x0))

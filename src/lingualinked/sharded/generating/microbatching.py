"""Decides how many microbatches the rows of a ``generate`` call run as.

Knows a call's rows and how workers round; neither sessions nor steps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from lingualinked.checks import is_count
from lingualinked.errors import ArgumentError
from lingualinked.planning.microbatches import MOST_PER_DEVICE, knows_rows, lockstep_s, split_rows
from lingualinked.quantities import count_text
from lingualinked.sharded.generating.steps_by_rows import StepsByRows
from lingualinked.workload import Workload

if TYPE_CHECKING:
    from torch import Tensor

    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.planning.plan import Plan


def check_num_microbatches(value: object) -> int | None:
    """Check ``num_microbatches``: a number, or None for the best one that changes no bit."""
    if value is None or is_count(value):
        return value
    raise ArgumentError(
        f"num_microbatches={value!r} must be a positive integer, or None for the fastest number that changes no bit"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of a call, and how long it is."""

    num_rows: int
    num_together: int  # rows in sequence that belong to one prompt
    mask: Tensor | None  # of the prompts, if some are padded
    prompt_tokens: int
    new_tokens: int

    def split_as_asked(self, num_microbatches: int) -> tuple[int, ...]:
        """Return the rows of each of so many microbatches; raise ArgumentError if there are fewer prompts."""
        num_prompts = self.num_rows // self.num_together
        if num_microbatches > num_prompts:
            raise ArgumentError(
                f"num_microbatches={num_microbatches} exceeds {count_text(num_prompts, 'prompt')}: give more rows, or ask for "
                "fewer microbatches"
            )
        return split_rows(self.num_rows, num_microbatches, self.num_together)

    def split_best(self, pipeline: Pipeline, *, in_lockstep: bool, most: int | None = None) -> tuple[int, ...]:
        """Return the rows of the microbatches that are predicted to be fastest, of those that change no bit; at most so many.

        What rows cost is known from the profile, or else from the decode steps so far. Where these had one number of rows, a
        rule decides: as many microbatches as devices keep all of them busy, unless other calls do; in lockstep, that may take
        longer than one.
        """
        plan = pipeline.plan
        num_devices = len(plan.devices)
        least_rows = pipeline.independent_rows
        if num_devices == 1 or not least_rows or self.num_rows < 2 * least_rows:
            return (self.num_rows,)
        most = min(self.num_rows // self.num_together, MOST_PER_DEVICE * num_devices, most or self.num_rows)
        num_sessions = 1 + pipeline.num_sessions_in_use
        exact = [number for number in range(1, most + 1) if number == 1 or self._is_exact(number, least_rows)]
        if plan.profile is not None and knows_rows(plan.profile):
            number = min(exact, key=lambda each: self._predicted_s(plan, each, num_sessions, in_lockstep=in_lockstep))
            return split_rows(self.num_rows, number, self.num_together)
        seen = StepsByRows.of(pipeline.latest_steps(), plan.spans)
        if seen is not None:
            split = functools.partial(split_rows, self.num_rows, num_together=self.num_together)
            number = min(exact, key=lambda each: seen.token_s(split(each), num_sessions, in_lockstep=in_lockstep))
        else:
            fitting = 1 if in_lockstep else max(1, num_devices // num_sessions)
            number = max(each for each in exact if each <= fitting)
        return split_rows(self.num_rows, number, self.num_together)

    def _predicted_s(self, plan: Plan, number: int, num_sessions: int, *, in_lockstep: bool) -> float:
        """Return the seconds between the answers of so many calls at once, of which each runs as so many microbatches."""
        predicted = plan.predict(
            Workload(
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                batch_size=self.num_rows,
                num_microbatches=number,
            )
        )
        call_s = lockstep_s(predicted) if in_lockstep else predicted.request_s
        return max(call_s / num_sessions, self.new_tokens * predicted.bottleneck_s)

    def _is_exact(self, number: int, least_rows: int) -> bool:
        """Say whether all microbatches have enough rows, and padded ones among them if the batch has: others need no mask."""
        sizes = split_rows(self.num_rows, number, self.num_together)
        if min(sizes) < least_rows:
            return False
        masks = () if self.mask is None or bool(self.mask.all()) else self.mask.split(sizes)
        return not any(bool(mask.all()) for mask in masks)

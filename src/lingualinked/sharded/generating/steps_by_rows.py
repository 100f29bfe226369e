"""What decode steps of so many rows take in each stage, from those that have been recorded.

Knows samples of steps; neither plans nor who runs a batch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence

from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.telemetry.samples import StepSample

_FEWEST_STEPS = 8  # of one number of rows


@dataclasses.dataclass(frozen=True, slots=True)
class StepsByRows:
    """The times of decode steps by their rows, in each stage and on the way."""

    compute: tuple[ModuleTimes, ...]  # stage by stage
    hops: ModuleTimes

    @classmethod
    def of(cls, steps: Sequence[StepSample], spans: tuple[tuple[str, int, int], ...]) -> StepsByRows | None:
        """Take medians of the steps through a plan's stages; None unless there are enough of at least two numbers of rows."""
        by_rows: defaultdict[int, list[tuple[float, ...]]] = defaultdict(list)
        for step in steps:
            if step.is_decode and tuple((each.device, each.start, each.end) for each in step.stages) == spans:
                hops_s = sum(each.hop_s + each.codec_s for each in step.stages)
                by_rows[step.rows].append((*(each.compute_s for each in step.stages), hops_s))
        known = {rows: samples for rows, samples in by_rows.items() if len(samples) >= _FEWEST_STEPS}
        if len(known) < 2:
            return None
        medians = {rows: [*map(statistics.median, zip(*samples, strict=True))] for rows, samples in known.items()}
        *compute, hops = (
            ModuleTimes(
                tuple(
                    StepTime(rows=rows, tokens=1, context=0, seconds=max(0.0, seconds[index]))
                    for rows, seconds in medians.items()
                )
            )
            for index in range(len(spans) + 1)
        )
        return cls(tuple(compute), hops)

    def token_s(self, sizes: Sequence[int], num_sessions: int, *, in_lockstep: bool) -> float:
        """Return the seconds between two tokens of all rows, with so many calls at once whose microbatches have such sizes."""
        rows = max(sizes)
        stages_s = [each.seconds(rows, 1, 0) for each in self.compute]
        step_s, busiest_s = sum(stages_s) + self.hops.seconds(rows, 1, 0), max(stages_s)
        call_s = step_s + (len(sizes) - 1) * busiest_s if in_lockstep else step_s
        return max(call_s / num_sessions, len(sizes) * busiest_s)

"""Reconstructs when each stage was busy, on the caller's clock, and utilisation over time.

Knows steps. A stage's times follow from the time of the request and the durations before it.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lingualinked.telemetry.samples import StepSample


class StageInterval(NamedTuple):
    """A stage's part in a step: arrival of its message, start and end of its work; seconds on the caller's clock."""

    device: str
    arrival_s: float
    start_s: float
    end_s: float


def stage_intervals(step: StepSample) -> list[StageInterval]:
    """Return when each stage of a step was busy, in pipeline order.

    The durations are laid end to end from the time of the request, so no two clocks are compared. If measurement errors
    make their sum exceed the caller's total, all are scaled down.
    """
    accounted_s = sum(stage.total_s for stage in step.stages)
    scale = min(1.0, step.total_s / accounted_s) if accounted_s > 0 else 1.0
    now_s = step.time_s
    intervals = []
    for stage in step.stages:
        arrival_s = now_s + scale * stage.hop_s
        start_s = arrival_s + scale * stage.wait_s
        now_s = start_s + scale * (stage.compute_s + stage.codec_s)
        intervals.append(StageInterval(stage.device, arrival_s, start_s, now_s))
    return intervals


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Speed, utilisation and compute time in equal windows of time."""

    edges_s: tuple[float, ...]  # starts of the windows, and the end of the last one
    tokens_per_s: tuple[float, ...]  # of `counted_steps`
    utilisation: dict[str, tuple[float, ...]]  # by device
    compute_s: dict[str, tuple[float, ...]]  # by device, medians of `counted_steps`; NaN where none was completed


def windows_of(steps: Sequence[StepSample], begin_s: float, end_s: float, num_windows: int) -> Windows:
    """Divide a time span into windows, and compute the figures of each; devices in the order in which steps visit them."""
    width_s = (end_s - begin_s) / num_windows
    edges_s = (*(begin_s + width_s * index for index in range(num_windows)), end_s)
    tokens = [0.0] * num_windows
    busy_s = {device: [0.0] * num_windows for device in devices_of(steps)}
    computed: dict[str, list[list[float]]] = {device: [[] for _ in tokens] for device in busy_s}
    for step in steps:
        for interval in stage_intervals(step):
            _spread(
                busy_s[interval.device], edges_s, interval.start_s, interval.end_s, interval.end_s - interval.start_s
            )
    for step in counted_steps(steps):
        _spread(tokens, edges_s, step.time_s, step.end_s, step.rows * step.tokens)
        if begin_s <= step.end_s <= end_s:
            index = min(bisect.bisect_right(edges_s, step.end_s) - 1, num_windows - 1)
            for device, seconds in compute_of(step).items():
                computed[device][index].append(seconds)
    return Windows(
        edges_s=edges_s,
        tokens_per_s=tuple(each / width_s for each in tokens),
        utilisation={device: tuple(min(1.0, each / width_s) for each in row) for device, row in busy_s.items()},
        compute_s={
            device: tuple(statistics.median(each) if each else math.nan for each in row)
            for device, row in computed.items()
        },
    )


def counted_steps(steps: Sequence[StepSample]) -> Sequence[StepSample]:
    """Return the steps whose tokens count as speed: decode steps, or all if there are none."""
    return [step for step in steps if step.is_decode] or steps


def devices_of(steps: Iterable[StepSample]) -> list[str]:
    """List the devices that steps visit: those of the first plan in its order, then later ones."""
    return list(dict.fromkeys(stage.device for step in steps for stage in step.stages))


def compute_of(step: StepSample) -> dict[str, float]:
    """Return the compute seconds of a step on each device, summed over its stages there."""
    seconds: dict[str, float] = {}
    for stage in step.stages:
        seconds[stage.device] = seconds.get(stage.device, 0.0) + stage.compute_s
    return seconds


def _spread(into: list[float], edges_s: tuple[float, ...], start_s: float, stop_s: float, amount: float) -> None:
    """Distribute an amount over the windows that an interval covers, in proportion to the overlap."""
    if stop_s <= edges_s[0] or start_s >= edges_s[-1] or stop_s <= start_s:
        return
    index = max(bisect.bisect_right(edges_s, start_s) - 1, 0)
    while index < len(into) and edges_s[index] < stop_s:
        inside_s = min(stop_s, edges_s[index + 1]) - max(start_s, edges_s[index])
        into[index] += amount * inside_s / (stop_s - start_s)
        index += 1

"""Formats the times of a step in each stage as a table.

Knows histories; not how they are recorded.
"""

from __future__ import annotations

import statistics

from lingualinked.quantities import bytes_text, count_text, seconds_text
from lingualinked.tables import Rows
from lingualinked.telemetry.history import History
from lingualinked.telemetry.samples import StageTiming
from lingualinked.telemetry.timeline import counted_steps


def stage_rows(history: History) -> Rows:
    """Make a table of median times of decode steps per stage, with notes on the overlap of stages."""
    steps = counted_steps(history.steps)
    visits: dict[tuple[str, int, int], list[StageTiming]] = {}
    for step in steps:
        for timing in step.stages:
            visits.setdefault((timing.device, timing.start, timing.end), []).append(timing)
    busy = history.utilisation()
    notes = []
    if steps:
        notes = [
            f"from request to answer: {seconds_text(statistics.median(step.total_s for step in steps))}",
            f"{history.tokens_per_s():.1f} tokens/s; {sum(busy.values()):.1f} of {count_text(len(busy), 'device')} busy on average",
        ]
    computed = {place: statistics.median(each.compute_s for each in timings) for place, timings in visits.items()}
    longest = max(computed.values(), default=0.0) or 1.0
    return Rows(
        title=f"Times of a {_kind(history)} in each stage, median of {len(steps)}",
        columns=("device", "layers", "hop", "wait", "compute", "codec", "sent", "busy"),
        rows=[
            (
                device,
                f"[{start}, {end})",
                seconds_text(statistics.median(each.hop_s for each in timings)),
                seconds_text(statistics.median(each.wait_s for each in timings)),
                seconds_text(computed[device, start, end]),
                seconds_text(statistics.median(each.codec_s for each in timings)),
                bytes_text(statistics.median(each.sent_bytes for each in timings)),
                f"{busy[device]:.0%}",
            )
            for (device, start, end), timings in visits.items()
        ],
        bars=[computed[place] / longest for place in visits],
        notes=notes,
    )


def _kind(history: History) -> str:
    return "decode step" if any(step.is_decode for step in history.steps) else "step"

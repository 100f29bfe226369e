"""Formats a telemetry snapshot as a table, and draws it.

Knows snapshots; not how they are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingualinked.display.decisions_view import record_line
from lingualinked.display.figure import new_figure
from lingualinked.display.history_view import history_figure
from lingualinked.display.palette import KV, PLAIN, WEIGHTS
from lingualinked.errors import ArgumentError
from lingualinked.quantities import bytes_text, count_text, seconds_text
from lingualinked.tables import Rows
from lingualinked.telemetry.snapshot import Telemetry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_LATEST = 3
"""The number of decisions and migrations that are listed below the table."""


def telemetry_rows(telemetry: Telemetry) -> Rows:
    """Make a table of a snapshot, a row per stage, with notes on recent speed, decisions and migrations."""
    workers = {worker.device: worker for worker in telemetry.workers}
    longest = max((_mean_s(stage.compute_s, stage.num_steps) for stage in telemetry.stages), default=0.0) or 1.0
    return Rows(
        title="Stages and their workers: memory, and time and bytes per step",
        columns=("device", "layers", "weights", "KV", "resident", "over idle", "steps", "a step", "sent"),
        rows=[
            (
                stage.device,
                f"[{stage.start}, {stage.end})",
                bytes_text(stage.weight_bytes),
                bytes_text(stage.kv_bytes),
                bytes_text(workers[stage.device].resident_bytes),
                bytes_text(workers[stage.device].resident_bytes - workers[stage.device].idle_resident_bytes),
                str(stage.num_steps),
                seconds_text(_mean_s(stage.compute_s, stage.num_steps)),
                bytes_text(stage.sent_bytes / max(stage.num_steps, 1)),
            )
            for stage in telemetry.stages
        ],
        bars=[_mean_s(stage.compute_s, stage.num_steps) / longest for stage in telemetry.stages],
        notes=_history_notes(telemetry),
    )


def telemetry_figure(telemetry: Telemetry, last_s: float | None = None) -> Figure:
    """Draw the history over time, or its last seconds; before the first step, memory and compute time per stage."""
    if last_s is not None and not last_s > 0:
        raise ArgumentError(f"last_s={last_s} leaves nothing to draw: give seconds above 0, or None for all")
    return history_figure(telemetry.history, last_s) if telemetry.steps else _stages_figure(telemetry)


def _stages_figure(telemetry: Telemetry) -> Figure:
    names = [f"{stage.device}\nlayers [{stage.start}, {stage.end})" for stage in telemetry.stages]
    mebi = 1024**2
    weights = [stage.weight_bytes / mebi for stage in telemetry.stages]
    kv = [stage.kv_bytes / mebi for stage in telemetry.stages]
    times_ms = [_mean_s(stage.compute_s, stage.num_steps) * 1e3 for stage in telemetry.stages]
    figure = new_figure(9, 1.6 + 0.6 * len(names))
    figure.suptitle(f"Memory and compute of {count_text(len(names), 'stage')}", fontsize=11)
    memory_axes, time_axes = figure.subplots(1, 2, sharey=True)
    memory_axes.barh(names, weights, color=WEIGHTS, label="weights")
    memory_axes.barh(names, kv, left=weights, color=KV, label="KV cache")
    memory_axes.set_xlabel("MiB")
    memory_axes.set_title("memory")
    memory_axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    memory_axes.invert_yaxis()
    time_axes.barh(names, times_ms, color=PLAIN)
    time_axes.set_xlabel("ms per step")
    time_axes.set_title("compute")
    for axes in (memory_axes, time_axes):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _history_notes(telemetry: Telemetry) -> list[str]:
    notes = []
    if telemetry.steps:
        busy = ", ".join(f"{device} {share:.0%}" for device, share in telemetry.utilisation().items())
        notes.append(f"in the last 10 s: {telemetry.tokens_per_s():.1f} tokens/s; busy: {busy}")
    start_s = telemetry.history.start_s
    notes += [f"decided {record_line(each, start_s)}" for each in telemetry.decisions[-NUM_LATEST:]]
    notes += [f"migration {record_line(each, start_s)}" for each in telemetry.migrations[-NUM_LATEST:]]
    return notes


def _mean_s(total_s: float, num_steps: int) -> float:
    return total_s / num_steps if num_steps else 0.0

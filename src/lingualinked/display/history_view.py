"""Draws the history of a pipeline: stage times, utilisation and tokens per second over time.

Knows histories; not how they are recorded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lingualinked.display.figure import ABOVE_RIGHT, LEGEND, new_figure
from lingualinked.display.palette import DEVICES, FAILED, MOVED
from lingualinked.quantities import count_text, seconds_text
from lingualinked.telemetry.decisions import Migration, moves_text
from lingualinked.telemetry.history import History
from lingualinked.telemetry.samples import StepSample
from lingualinked.telemetry.timeline import Windows, compute_of, counted_steps, windows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 200
"""Up to this number, steps are drawn individually; beyond it, the median of each window."""
LEGEND_COLUMNS = 6
MAX_LABELS = 6
"""Up to this number, migrations are labelled with what they moved."""


def history_figure(history: History, last_s: float | None = None) -> Figure:
    """Draw a history with at least one step: its last seconds before the last completed step, or all of it."""
    last_step_s = history.end_s
    begin_s = min(step.time_s for step in history.steps)
    if last_s is not None:
        begin_s = max(begin_s, last_step_s - last_s)
    end_s = max(
        [last_step_s, begin_s + 1e-6, *(each.end_s for each in history.migrations if each.time_s <= last_step_s)]
    )
    steps = [step for step in history.steps if step.end_s >= begin_s]
    windows = windows_of(steps, begin_s, end_s, min(120, max(12, len(steps) // 8)))
    migrations = [each for each in history.migrations if each.end_s >= begin_s and each.time_s <= end_s]
    colours = {device: DEVICES[index % len(DEVICES)] for index, device in enumerate(windows.utilisation)}

    busy_in = 0.5 + 0.42 * len(colours)
    figure = new_figure(10, 4.9 + busy_in)
    done = [each for each in migrations if each.succeeded]
    moved = f", {count_text(len(done), 'migration')}" if done else ""
    failed = f", {len(migrations) - len(done)} failed" if len(done) < len(migrations) else ""
    figure.suptitle(
        f"{count_text(len(steps), 'step')} of {count_text(len({step.session for step in steps}), 'session')} "
        f"in {seconds_text(end_s - begin_s)}{moved}{failed}",
        fontsize=11,
    )
    axes: Sequence[Axes] = figure.subplots(3, 1, sharex=True, height_ratios=(2.4, busy_in, 1.5))
    _draw_compute(axes[0], steps, windows, colours, history.start_s)
    _draw_utilisation(axes[1], windows, colours, history.start_s)
    _draw_rate(axes[2], windows, history.start_s, "new" if counted_steps(steps)[-1].is_decode else "prompt")
    axes[0].set_xlim(begin_s - history.start_s, end_s - history.start_s)
    _mark_migrations(axes, migrations, history.start_s)
    if migrations:
        _explain_marks(axes[-1], migrations)
    axes[-1].set_xlabel("seconds since the pipeline was started")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
        each.grid(axis="x", color="#ececec", linewidth=0.8)
    return figure


def _draw_compute(
    axes: Axes, steps: Sequence[StepSample], windows: Windows, colours: dict[str, str], start_s: float
) -> None:
    """Draw a line per device: its steps, or medians if there are many."""
    counted = counted_steps(steps)
    kind = "decode" if counted[-1].is_decode else "prefill"
    highest_ms = 0.0
    for device, colour in colours.items():
        if len(counted) <= MAX_POINTS:
            points = [(step.end_s - start_s, compute_of(step).get(device, math.nan)) for step in counted]
        else:
            points = _medians(windows, device, start_s)
        times_s, values_ms = [time_s for time_s, _ in points], [1e3 * seconds for _, seconds in points]
        marker = "o" if len(points) <= 30 else None
        axes.plot(times_s, values_ms, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=device)
        finite = sorted(each for each in values_ms if math.isfinite(each))
        if finite:
            highest_ms = max(highest_ms, min(finite[-1], 3 * finite[int(0.95 * (len(finite) - 1))]))
    legend_rows = math.ceil(len(colours) / LEGEND_COLUMNS)
    axes.set_ylim(0, (1.05 + 0.12 * legend_rows) * highest_ms or 1.0)  # so that the lines stay below the legend
    axes.set_ylabel("ms")
    axes.set_title(f"compute of a {kind} step", loc="left", fontsize=10)
    if colours:
        axes.legend(loc="upper left", ncols=min(len(colours), LEGEND_COLUMNS), **LEGEND)


def _medians(windows: Windows, device: str, start_s: float) -> list[tuple[float, float]]:
    """Return the middle of each window with completed steps, and this device's median or NaN."""
    points = []
    for index, seconds in enumerate(windows.compute_s[device]):
        if all(math.isnan(row[index]) for row in windows.compute_s.values()):
            continue  # no step: the line continues
        points.append(((windows.edges_s[index] + windows.edges_s[index + 1]) / 2 - start_s, seconds))
    return points


def _draw_utilisation(axes: Axes, windows: Windows, colours: dict[str, str], start_s: float) -> None:
    """Draw a row per device, filled in proportion to its utilisation."""
    edges_s = [edge_s - start_s for edge_s in windows.edges_s]
    for row, (device, busy) in enumerate(windows.utilisation.items()):
        base, height = row + 0.4, 0.8
        axes.axhspan(base - height, base, color="#f4f4f4", linewidth=0)
        axes.stairs([base - height * each for each in busy], edges_s, baseline=base, fill=True, color=colours[device])
        axes.annotate(
            f"{statistics.fmean(busy):.0%}",
            (1.0, row),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(colours)), list(colours))
    axes.set_ylim(max(len(colours), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_title("utilisation: full height is 100 %; averages at the right", loc="left", fontsize=10)


def _draw_rate(axes: Axes, windows: Windows, start_s: float, kind: str) -> None:
    edges_s = [edge_s - start_s for edge_s in windows.edges_s]
    axes.stairs(windows.tokens_per_s, edges_s, fill=True, color="#c9c9c9")
    axes.stairs(windows.tokens_per_s, edges_s, baseline=None, color="#4a4a4a", linewidth=1.2)
    axes.set_ylim(0, 1.15 * max(windows.tokens_per_s) or 1.0)
    axes.set_ylabel("tokens/s")
    axes.set_title(f"{kind} tokens of all sessions", loc="left", fontsize=10)


def _mark_migrations(axes: Sequence[Axes], migrations: Sequence[Migration], start_s: float) -> None:
    """Mark each migration by a band, a line at its end, and a label with the moved layers."""
    left_s, right_s = axes[0].get_xlim()
    for number, each in enumerate(migrations):
        colour = MOVED if each.succeeded else FAILED
        begin_s, end_s = each.time_s - start_s, each.end_s - start_s
        for part in axes:
            part.axvspan(begin_s, end_s, color=colour, alpha=0.25, linewidth=0, zorder=0.5)
            part.axvline(end_s, color="black" if each.succeeded else FAILED, linewidth=1, linestyle="--", zorder=3)
        if len(migrations) > MAX_LABELS:
            continue
        text = moves_text(each.moves) if each.succeeded else f"failed: {moves_text(each.moves)}"
        axes[0].annotate(
            text,
            (end_s, 1.0),
            xycoords=axes[0].get_xaxis_transform(),
            xytext=(0, 20 + 12 * number),
            textcoords="offset points",
            ha=_side((end_s - left_s) / (right_s - left_s)),
            fontsize=8,
            color="black" if each.succeeded else FAILED,
        )


def _explain_marks(axes: Axes, migrations: Sequence[Migration]) -> None:
    """Add a legend for bands and dashed lines."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Patch | Line2D] = []
    if any(each.succeeded for each in migrations):
        marks.append(Patch(color=MOVED, alpha=0.25, linewidth=0, label="layers are being moved"))
        marks.append(Line2D([], [], color="black", linewidth=1, linestyle="--", label="a new plan is in force"))
    if not all(each.succeeded for each in migrations):
        marks.append(Patch(color=FAILED, alpha=0.25, linewidth=0, label="a move failed"))
    axes.legend(handles=marks, ncols=len(marks), **ABOVE_RIGHT)


def _side(place: float) -> Literal["left", "center", "right"]:
    """Return the alignment that keeps a label within the figure."""
    return "left" if place < 0.3 else "right" if place > 0.7 else "center"

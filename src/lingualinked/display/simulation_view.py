"""Formats the result of a simulation as tables, and draws when each server is busy.

Knows the result of a simulation; not how it is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lingualinked.display.figure import ABOVE_RIGHT, new_figure
from lingualinked.display.palette import DECODE, LIMITING, PLAIN, PREFILL
from lingualinked.planning.simulation.result import BusyInterval, Simulation
from lingualinked.quantities import count_text, seconds_text
from lingualinked.tables import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TABLE_ROWS = 20
MAX_CHART_ROWS = 24
SHADES = {"prefill": PREFILL, "decode": DECODE}
NUM_BINS = 240
"""Of a chart whose visits are too short to be drawn individually."""


def latency_rows(simulation: Simulation) -> Rows:
    """Make a table of rates and latencies."""
    durations = {
        "first token": simulation.first_token_s,
        "between tokens": simulation.inter_token_s,
        "whole request": simulation.request_s,
    }
    return Rows(
        title=f"{_rates(simulation)}\n{count_text(simulation.num_requests, 'request')}, {count_text(simulation.num_tokens, 'token')} "
        f"in {seconds_text(simulation.makespan_s)}",
        columns=("latency", "mean", "p50", "p90", "p99"),
        rows=[
            (name, *(seconds_text(value) for value in (spread.mean, spread.p50, spread.p90, spread.p99)))
            for name, spread in durations.items()
            if spread is not None
        ],
    )


def server_rows(simulation: Simulation) -> Rows:
    """Make a table of the utilisation of each server, or of the busiest ones."""
    shown, title = _busiest(simulation, MAX_TABLE_ROWS)
    return Rows(
        title=title,
        columns=("server", "busy", "busy for", ""),
        rows=[
            (
                name,
                f"{simulation.utilisation[name]:.1%}",
                seconds_text(simulation.utilisation[name] * simulation.makespan_s),
                "bottleneck" if name == simulation.bottleneck else "",
            )
            for name in shown
        ],
        bars=[simulation.utilisation[name] for name in shown],
    )


def simulation_figure(simulation: Simulation) -> Figure:
    """Draw a Gantt chart of the first visits, and the utilisation over the whole run."""
    shown, title = _busiest(simulation, MAX_CHART_ROWS)
    figure = new_figure(11, 2.3 + 0.32 * len(shown))
    figure.suptitle(_rates(simulation), fontsize=11)
    chart, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    _draw_intervals(chart, simulation, shown)
    busy = [simulation.utilisation[name] for name in shown]
    colours = [LIMITING if name == simulation.bottleneck else PLAIN for name in shown]
    bars.barh(range(len(shown)), busy, 0.72, color=colours)
    for row, fraction in enumerate(busy):
        inside = fraction > 0.7
        bars.annotate(
            f"{fraction:.0%}",
            (fraction, row),
            xytext=(-3 if inside else 3, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside else "black",
        )
    bars.set(xlim=(0, 1), xlabel="fraction of the whole run")
    bars.set_title(title, fontsize=10)
    for axes in (chart, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    return figure


def _draw_intervals(axes: Axes, simulation: Simulation, shown: list[str]) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    rows = {name: row for row, name in enumerate(shown)}
    start_s, end_s = _window(simulation)
    intervals = [interval for interval in simulation.intervals if interval.server in rows]
    is_binned = _are_too_fine(intervals, end_s - start_s)
    if is_binned:
        _draw_shares(axes, intervals, rows, start_s, end_s)
    else:
        _draw_visits(axes, intervals, rows, start_s, end_s)
    kinds = [kind for kind in SHADES if any(interval.kind == kind for interval in simulation.intervals)]
    num_shades = min(4, 1 + max((each.session for each in simulation.intervals), default=0))
    shades = slice(1, 2) if is_binned else slice(num_shades)
    patches = [tuple(Patch(color=colour) for colour in SHADES[kind][shades]) for kind in kinds]
    meaning = " (shade and number: session)" if num_shades > 1 and not is_binned else ""
    axes.legend(
        [*patches, Patch(color=LIMITING)],
        [*(f"{kind}{meaning}" for kind in kinds), "bottleneck"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        handlelength=3,
        ncols=3,
        **ABOVE_RIGHT,
    )
    axes.set_yticks(range(len(shown)), shown)
    axes.set(xlim=(start_s, end_s), ylim=(len(shown) - 0.5, -0.5), xlabel="seconds")
    width = seconds_text((end_s - start_s) / NUM_BINS)
    axes.set_title(
        f"utilisation: full height is 100 % of each {width}" if is_binned else "visits", loc="left", fontsize=10
    )


def _are_too_fine(intervals: list[BusyInterval], window_s: float) -> bool:
    """Return whether half of all work is in visits shorter than a bin."""
    lengths_s = sorted(interval.end_s - interval.start_s for interval in intervals)
    total_s, sum_s = sum(lengths_s), 0.0
    for length_s in lengths_s:
        sum_s += length_s
        if 2 * sum_s >= total_s > 0:
            return length_s < window_s / NUM_BINS
    return False


def _draw_shares(axes: Axes, intervals: list[BusyInterval], rows: dict[str, int], start_s: float, end_s: float) -> None:
    """Fill each bin of a row in proportion to its utilisation, decode steps on top of prefills."""
    edges_s = np.linspace(start_s, end_s, NUM_BINS + 1)
    for name, row in rows.items():
        bottom = np.full(NUM_BINS, row + 0.36)
        for kind, shades in SHADES.items():
            seen = [each for each in intervals if each.server == name and each.kind == kind]
            if not seen:
                continue
            begins_s = np.array([each.start_s for each in seen])
            lengths_s = np.array([each.end_s for each in seen]) - begins_s
            done_s = np.clip(edges_s[:, None] - begins_s, 0, lengths_s).sum(axis=1)
            top = bottom - 0.72 * np.diff(done_s) / np.diff(edges_s)
            axes.stairs(top, edges_s, baseline=bottom, fill=True, color=shades[1])
            bottom = top


def _draw_visits(axes: Axes, intervals: list[BusyInterval], rows: dict[str, int], start_s: float, end_s: float) -> None:
    """Draw each visit in the shade of its session, with the session's number if there is room."""
    seen: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for interval in intervals:
        shade = interval.session % len(SHADES[interval.kind])
        span = (interval.start_s, interval.end_s - interval.start_s)
        seen.setdefault((interval.server, interval.kind, shade), []).append(span)
    for (server, kind, shade), spans in seen.items():
        # Edges of the same colour keep the shortest visits visible.
        axes.broken_barh(spans, (rows[server] - 0.36, 0.72), color=SHADES[kind][shade], linewidth=0.5)
    for interval in intervals:
        middle_s = (interval.start_s + interval.end_s) / 2
        is_wide = interval.end_s - interval.start_s > 0.022 * (end_s - start_s)
        if is_wide and middle_s < end_s:
            dark = interval.session % 4 < 2
            axes.text(
                middle_s,
                rows[interval.server],
                str(interval.session),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
                clip_on=True,
            )


def _window(simulation: Simulation) -> tuple[float, float]:
    """Return the time span in which all visits are recorded."""
    intervals = simulation.intervals
    if not intervals:
        return 0.0, simulation.makespan_s
    start_s, end_s = intervals[0].start_s, max(interval.end_s for interval in intervals)
    kept_s = sum(interval.end_s - interval.start_s for interval in intervals)
    all_s = sum(simulation.utilisation.values()) * simulation.makespan_s
    if kept_s < all_s * (1 - 1e-9) and intervals[-1].start_s > start_s:
        end_s = intervals[-1].start_s  # later visits are not recorded
    return start_s, end_s if end_s > start_s else start_s + simulation.makespan_s


def _busiest(simulation: Simulation, num_rows: int) -> tuple[list[str], str]:
    names = list(simulation.utilisation)
    if len(names) <= num_rows:
        return names, "Utilisation"
    busiest = set(sorted(names, key=simulation.utilisation.__getitem__, reverse=True)[:num_rows])
    return [name for name in names if name in busiest], f"The {num_rows} busiest of {len(names):,}"


def _rates(simulation: Simulation) -> str:
    return (
        f"{simulation.tokens_per_s:,.4g} tokens/s, {simulation.requests_per_s:,.3g} requests/s; "
        f"the bottleneck is {simulation.bottleneck}, busy {simulation.utilisation[simulation.bottleneck]:.0%}"
    )

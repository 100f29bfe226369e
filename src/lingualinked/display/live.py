"""Draws a running pipeline in a terminal: stages with their layers, speed over time, recent decisions.

Knows snapshots; neither who takes them nor how often.
"""

from __future__ import annotations

import math

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lingualinked.display.decisions_view import record_line
from lingualinked.quantities import seconds_text
from lingualinked.telemetry.snapshot import Telemetry
from lingualinked.telemetry.timeline import windows_of

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_LEVELS = " ▁▂▃▄▅▆▇█"
_NUM_WINDOWS = 60
_BUSY_WIDTH = 12
_BORDER = 4
"""Columns of the panel itself."""
_COLUMNS_BESIDE_BAR = 40
"""Columns of layers, time and utilisation, with the gaps."""
_MIN_BAR_WIDTH = 8
_COLUMNS_BESIDE_SPEED = 17
_RECENT_S = 2.0
_NUM_EVENTS = 4  # recent decisions and migrations that are listed


def live_view(telemetry: Telemetry, *, last_s: float = 30.0, note: str = "", width: int = 100) -> Panel:
    """Draw the present state of a pipeline on so many columns, at least 40, with a note at the top."""
    history = telemetry.history
    end_s = max(history.end_s, history.start_s + 1e-3)
    sampled = {sample.device for sample in telemetry.device_samples}
    devices = sorted(sampled | {worker.device for worker in telemetry.workers})
    colours = {device: _COLOURS[index % len(_COLOURS)] for index, device in enumerate(devices)}
    recent = windows_of(history.steps, end_s - _RECENT_S, end_s, 1)
    num_layers = max((stage.end for stage in telemetry.stages), default=0)
    room = width - _BORDER - _COLUMNS_BESIDE_BAR - max(map(len, devices), default=0)
    bar_width = min(num_layers, room) if room >= _MIN_BAR_WIDTH else 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column in ("device", "layers", "", "a step", "busy") if bar_width else ("device", "layers", "a step", "busy"):
        table.add_column(column, no_wrap=True)
    for stage in telemetry.stages:
        compute_s = recent.compute_s.get(stage.device, (math.nan,))[0]
        busy = recent.utilisation.get(stage.device, (0.0,))[0]
        colour = colours[stage.device]
        name, span = Text(stage.device, style=colour), f"[{stage.start}, {stage.end})"
        took = "-" if math.isnan(compute_s) else seconds_text(compute_s)
        if bar_width:
            layers = _bar(stage.start / num_layers, stage.end / num_layers, bar_width, colour, "·")
            table.add_row(name, span, layers, took, _bar(0, busy, _BUSY_WIDTH, colour, "░"))
        else:
            table.add_row(name, span, took, f"{busy:.0%}")
    begin_s = max(history.start_s, end_s - last_s)
    num_windows = min(_NUM_WINDOWS, width - _BORDER - _COLUMNS_BESIDE_SPEED)
    rates = windows_of(history.steps, begin_s, begin_s + last_s, num_windows).tokens_per_s
    speed = Text(f"{telemetry.tokens_per_s(_RECENT_S):6.1f} tokens/s  ", style="bold").append(_spark(rates), "cyan")
    drawn = Group(Text(note), Text(), table, Text(), speed, Text(), *_events(telemetry))
    return Panel(drawn, width=width)


def _bar(begin: float, end: float, width: int, colour: str, empty: str) -> Text:
    """Draw a bar of ``width`` columns that is filled from ``begin`` to ``end``, fractions of its length."""
    first = min(round(begin * width), width - 1)
    last = max(round(end * width), first + (end > begin))
    bar = Text(empty * first, style="dim").append("█" * (last - first), style=colour)
    return bar.append(empty * (width - last), style="dim")


def _spark(values: tuple[float, ...]) -> str:
    highest = max(values, default=0.0) or 1.0
    return "".join(_LEVELS[round(value / highest * (len(_LEVELS) - 1))] for value in values)


def _events(telemetry: Telemetry) -> list[Text]:
    start_s = telemetry.history.start_s
    events = [(each.time_s, Text(record_line(each, start_s))) for each in telemetry.decisions]
    events += [
        (each.time_s, Text(record_line(each, start_s), style="bold green" if each.succeeded else "bold red"))
        for each in telemetry.migrations
    ]
    events.sort(key=lambda pair: pair[0])
    return [line for _, line in events[-_NUM_EVENTS:]]

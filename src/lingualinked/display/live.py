"""A running pipeline as a picture in a terminal: stages with their layers, speed over time, the last decisions.

Knows snapshots; neither who takes them nor how often.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lingualinked.display.decisions import decision_line, migration_line
from lingualinked.quantities import seconds_text
from lingualinked.telemetry.timeline import windows_of

if TYPE_CHECKING:
    from lingualinked.telemetry.snapshot import Telemetry

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_LEVELS = " ▁▂▃▄▅▆▇█"
_NUM_WINDOWS = 60
_BUSY_WIDTH = 12
_LATELY_S = 2.0


def live_view(telemetry: Telemetry, *, last_s: float = 30.0, num_events: int = 4, note: str = "") -> Panel:
    """Draw what a pipeline does now.

    Parameters
    ----------
    telemetry : Telemetry
        The moment to draw.
    last_s : float
        Seconds of speed to draw.
    num_events : int
        So many of the last decisions and migrations are told.
    note : str
        A line above all.

    Returns
    -------
    rich.panel.Panel
        For a console, or for ``rich.live.Live``.
    """
    history = telemetry.history
    end_s = max(history.end_s, history.start_s + 1e-3)
    devices = sorted({worker.device for worker in telemetry.workers} | set(_seen(telemetry)))
    colours = {device: _COLOURS[index % len(_COLOURS)] for index, device in enumerate(devices)}
    lately = windows_of(history.steps, end_s - _LATELY_S, end_s, 1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("device", "layers", "", "a step", "busy"):
        table.add_column(column, no_wrap=True)
    num_layers = max((stage.end for stage in telemetry.stages), default=0)
    for stage in telemetry.stages:
        compute_s = lately.compute_s.get(stage.device, (math.nan,))[0]
        busy = lately.utilisation.get(stage.device, (0.0,))[0]
        bar = Text("·" * stage.start, style="dim")
        bar.append("█" * (stage.end - stage.start), style=colours[stage.device])
        bar.append("·" * (num_layers - stage.end), style="dim")
        filled = round(busy * _BUSY_WIDTH)
        table.add_row(
            Text(stage.device, style=colours[stage.device]),
            f"[{stage.start}, {stage.end})",
            bar,
            "-" if math.isnan(compute_s) else seconds_text(compute_s),
            Text("█" * filled, style=colours[stage.device]).append("░" * (_BUSY_WIDTH - filled), style="dim"),
        )
    begin_s = max(history.start_s, end_s - last_s)
    rates = windows_of(history.steps, begin_s, begin_s + last_s, _NUM_WINDOWS).tokens_per_s
    speed = Text(f"{telemetry.tokens_per_s(_LATELY_S):6.1f} tokens/s  ", style="bold").append(_spark(rates), "cyan")
    return Panel(Group(Text(note), Text(), table, Text(), speed, Text(), *_events(telemetry, num_events)))


def _seen(telemetry: Telemetry) -> list[str]:
    return [sample.device for sample in telemetry.device_samples]


def _spark(values: tuple[float, ...]) -> str:
    highest = max(values, default=0.0) or 1.0
    return "".join(_LEVELS[round(value / highest * (len(_LEVELS) - 1))] for value in values)


def _events(telemetry: Telemetry, num_events: int) -> list[Text]:
    start_s = telemetry.history.start_s
    told = [(each.time_s, Text(decision_line(each, start_s))) for each in telemetry.decisions]
    told += [
        (each.time_s, Text(migration_line(each, start_s), style="bold green" if each.succeeded else "bold red"))
        for each in telemetry.migrations
    ]
    told.sort(key=lambda pair: pair[0])
    return [line for _, line in told[-num_events:]]

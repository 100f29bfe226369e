"""Tables, which are shown as text in a terminal and as HTML in a notebook.

Knows rows and columns, not what they mean.
"""

from __future__ import annotations

import dataclasses
import html
import io
import sys
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lingualinked.console import UNLIMITED, terminal_width

_NOTE_WIDTH = 100
"""Columns after which notes are wrapped if there is no terminal."""
_TABLE = "border-collapse:collapse;border:none;table-layout:auto;margin:0.2em 0;color:inherit;background:transparent"
_CELL = "padding:0.2em 0.8em 0.2em 0;border:none;white-space:nowrap;font-variant-numeric:tabular-nums"
_SHADE = "rgba(128,128,128,0.35)"
"""Colour of lines and bars, visible on white and on black."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A table with text above and below it."""

    title: str
    columns: Sequence[str]  # those after the first are aligned to the right
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()  # empty, or a number between 0 and 1 per row, drawn as a bar in HTML
    notes: Sequence[str] = ()  # a line each

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw title, table and notes on a rich console; on a narrow one, each row becomes a block."""
        yield Text(self.title, style="bold")
        if self._width <= options.max_width:
            yield self._table()
        else:
            yield from self._blocks()
            yield Text()
        yield from map(Text, self.notes)

    def to_text(self) -> str:
        """Return the table as text in the columns of the terminal, or in as many as needed without one."""
        width = terminal_width(sys.stdout) or max(_NOTE_WIDTH, self._width)
        buffer = io.StringIO()
        Console(file=buffer, width=width, color_system=None, force_jupyter=False).print(self)
        return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))

    def to_html(self) -> str:
        """Return the table as HTML without a style sheet, for light and dark backgrounds."""
        head = "".join(
            f"<th style='{_CELL};border-bottom:1px solid {_SHADE};text-align:{_side(index)}'>{html.escape(column)}</th>"
            for index, column in enumerate(self.columns)
        )
        body = ""
        for number, row in enumerate(self.rows):
            body += "<tr style='background:transparent'>" + "".join(
                f"<td style='{_CELL};text-align:{_side(index)}'>{html.escape(cell)}</td>"
                for index, cell in enumerate(row)
            )
            if self.bars:
                share = 100 * min(max(self.bars[number], 0.0), 1.0)
                body += (
                    f"<td style='{_CELL};text-align:left'><div style='width:160px;height:0.8em;background:{_SHADE}'>"
                    f"<div style='width:{share:.1f}%;height:100%;background:#4c78a8'></div></div></td>"
                )
            body += "</tr>"
        spare = f"<th style='{_CELL};border-bottom:1px solid {_SHADE}'></th>" if self.bars else ""
        title = "<br>".join(map(html.escape, self.title.split("\n")))
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        return (
            "<div style='overflow-x:auto;margin:0.5em 0;text-align:left'>"
            f"<div style='font-weight:bold'>{title}</div><table style='{_TABLE}'>"
            f"<thead><tr style='background:transparent'>{head}{spare}</tr></thead><tbody>{body}</tbody></table>"
            f"{notes}</div>"
        )

    @property
    def _width(self) -> int:
        """The columns that the table needs."""
        console = Console(file=io.StringIO(), width=UNLIMITED, force_jupyter=False)
        return Measurement.get(console, console.options, self._table()).maximum

    def _table(self) -> Table:
        """Make the rich table, with one line per row, however wide it is."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _blocks(self) -> Iterator[RenderableType]:
        """Yield a block for each row, for narrow terminals: the first cell, then a line for each other cell."""
        for row in self.rows:
            if len(row) == 2:
                yield Text(row[0], style="bold")
                yield Padding(Text(row[1]), (0, 0, 0, 2))
                continue
            yield Text()
            if row[0]:
                yield Text.assemble(f"{self.columns[0]} ", (row[0], "bold"))
            grid = Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            for column, cell in zip(self.columns[1:], row[1:], strict=True):
                if cell:
                    grid.add_row(Text(f"  {column}"), Text(cell))
            yield grid


def _side(index: int) -> str:
    return "left" if index == 0 else "right"

"""Tables as text for a terminal and as HTML for a notebook, from the same rows.

Knows rows and columns, not what they mean.
"""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A table to draw.

    Parameters
    ----------
    title : str
        Above the table.
    columns : sequence of str
        Headings; those after the first are aligned to the right.
    rows : sequence of sequence of str
        Cells.
    bars : sequence of float
        One number between 0 and 1 per row, drawn as a bar in HTML; may be empty.
    notes : sequence of str
        Lines below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()
    notes: Sequence[str] = ()

    def to_rich(self) -> Group:
        """Return title and table for a rich console."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return Group(Text(self.title, style="bold"), table, *map(Text, self.notes))

    def to_text(self) -> str:
        """Return the table as plain text."""
        buffer = io.StringIO()
        Console(file=buffer, width=100, color_system=None).print(self.to_rich())
        return buffer.getvalue().rstrip()

    def to_html(self) -> str:
        """Return the table as HTML that needs no style sheet."""
        head = "".join(f"<th style='text-align:{_side(i)}'>{html.escape(c)}</th>" for i, c in enumerate(self.columns))
        body = ""
        for number, row in enumerate(self.rows):
            cells = "".join(f"<td style='text-align:{_side(i)}'>{html.escape(cell)}</td>" for i, cell in enumerate(row))
            bar = ""
            if self.bars:
                width = round(160 * min(max(self.bars[number], 0.0), 1.0))
                bar = (
                    "<td style='text-align:left'><div style='background:#4c78a8;height:0.8em;"
                    f"width:{width}px'></div></td>"
                )
            body += f"<tr>{cells}{bar}</tr>"
        spare = "<th></th>" if self.bars else ""
        return (
            f"<table><caption style='text-align:left;font-weight:bold'>{html.escape(self.title)}</caption>"
            f"<thead><tr>{head}{spare}</tr></thead><tbody>{body}</tbody></table>"
            + "".join(f"<div style='text-align:left'>{html.escape(note)}</div>" for note in self.notes)
        )


def _side(index: int) -> str:
    return "left" if index == 0 else "right"

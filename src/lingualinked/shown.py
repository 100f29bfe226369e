"""Records that show themselves, to print and to IPython, as what display makes of them.

Knows IPython's protocols for that; not IPython, and no record.
"""

from __future__ import annotations

from typing import Protocol

from lingualinked.registry import tables_of


class Printer(Protocol):
    """What IPython passes: a pretty-printer that knows how far its line is indented."""

    def text(self, obj: str) -> None:
        """Write within the line."""

    def break_(self) -> None:
        """Start a new line at the present indentation."""


class Printed:
    """Base of records that IPython writes, alone or within a list, as print writes them."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # IPython would take a dataclass's own __repr__ before what its base says.
        cls._repr_pretty_ = Printed._repr_pretty_  # type: ignore[method-assign]

    def _repr_pretty_(self, printer: Printer, _is_cycle: bool) -> None:
        for number, line in enumerate(str(self).splitlines()):
            if number:
                printer.break_()
            printer.text(line)


class Shown(Printed):
    """Base of records that are shown as the tables that display makes of them."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n\n".join(table.to_text() for table in tables_of(self))

    def _repr_html_(self) -> str:
        return f"<div>{''.join(table.to_html() for table in tables_of(self))}</div>"

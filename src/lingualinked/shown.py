"""Base classes of records that ``print`` and IPython show as tables.

Knows IPython's protocols; does not import IPython, and knows no record.
"""

from __future__ import annotations

from typing import Any

from lingualinked.registry import tables_of


class Printed:
    """Base of records that IPython shows as ``print`` does, alone or within a list."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # IPython prefers a dataclass's own __repr__ to an inherited _repr_pretty_.
        cls._repr_pretty_ = Printed._repr_pretty_  # type: ignore[method-assign]

    def _repr_pretty_(self, printer: Any, _is_cycle: bool) -> None:
        for number, line in enumerate(str(self).splitlines()):
            if number:
                printer.break_()
            printer.text(line)


class Shown(Printed):
    """Base of records that are shown as the tables that `lingualinked.display` makes of them."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n\n".join(table.to_text() for table in tables_of(self))

    def _repr_html_(self) -> str:
        return f"<div>{''.join(table.to_html() for table in tables_of(self))}</div>"

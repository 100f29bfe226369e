"""How IPython writes an object, alone or within a list: as print writes it.

Knows IPython's protocol for that; not IPython.
"""

from __future__ import annotations

from typing import Protocol


class Printer(Protocol):
    """What IPython passes: a pretty-printer that knows how far its line is indented."""

    def text(self, obj: str) -> None:
        """Write within the line."""

    def break_(self) -> None:
        """Start a new line at the present indentation."""


def pretty_text(shown: object, printer: Printer, _is_cycle: bool) -> None:
    """Write an object's ``str``: to be put into its class as ``_repr_pretty_``."""
    for number, line in enumerate(str(shown).splitlines()):
        if number:
            printer.break_()
        printer.text(line)

"""Where text goes: a terminal, whose width it fits, or a file or pipe, where nothing is wrapped or cut.

Knows rich; not what is printed.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

from rich.console import Console

UNLIMITED = 10_000
"""Columns that no line reaches."""


def new_console() -> Console:
    """Make a console for standard output."""
    return Console(width=terminal_width(sys.stdout) or UNLIMITED)


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the terminal behind a stream, or those that ``COLUMNS`` asks for; ``None`` without both."""
    if os.environ.get("COLUMNS", "").isdecimal() or stream.isatty():
        return shutil.get_terminal_size().columns
    return None

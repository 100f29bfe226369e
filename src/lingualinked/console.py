"""Makes consoles: text fits a terminal's width, and is never wrapped or cut in a file or pipe.

Knows rich; not what is printed.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

from rich.console import Console

UNLIMITED = 10_000
"""More columns than any line has."""


def new_console() -> Console:
    """Make a console for standard output."""
    return Console(width=terminal_width(sys.stdout) or UNLIMITED)


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of a stream's terminal, or those in ``COLUMNS``; ``None`` without either."""
    if os.environ.get("COLUMNS", "").isdecimal() or stream.isatty():
        return shutil.get_terminal_size().columns
    return None

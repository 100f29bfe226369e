"""Checks the files that commands will write, before any work is done.

Knows paths; not what is written.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lingualinked.display.figure import new_figure
from lingualinked.errors import ArgumentError


def check_output(option: str, path: Path) -> None:
    """Check that a file can be written; an error names the option."""
    if path.is_dir():
        raise ArgumentError(f"{option} {str(path)!r} is a folder: give the path of a file")
    if not path.parent.is_dir():
        raise ArgumentError(f"{option} {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ArgumentError(
            f"{option} {str(path)!r}: no file can be created in the folder {str(path.parent)!r} ({error.strerror}); "
            "choose another one"
        ) from error


def check_picture(option: str, path: Path) -> None:
    """Check that a picture can be drawn and written in the format of its suffix."""
    check_output(option, path)
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind and kind not in kinds:
        raise ArgumentError(
            f"{option} {str(path)!r}: matplotlib can't write .{kind} files; choose one of {', '.join(kinds)}"
        )

"""Files that commands write.

Knows paths; not what is written.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lingualinked.errors import ArgumentError


def check_output(option: str, path: Path) -> None:
    """Refuse a file that can't be written, before any work is done for it.

    Raises
    ------
    ArgumentError
        If it is a folder, or its folder is missing or can't be written to; the message names the option.
    """
    if path.is_dir():
        raise ArgumentError(f"{option} {str(path)!r} is a folder: name a file to write")
    if not path.parent.is_dir():
        raise ArgumentError(f"{option} {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ArgumentError(
            f"{option} {str(path)!r}: no file can be made in the folder {str(path.parent)!r} ({error.strerror}); "
            "choose another one"
        ) from error

"""Writes a file whole or not at all.

Knows nothing of what is in it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole_file(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write text under another name, and give it the right one; a failure leaves neither, nor harms what was there.

    Parameters
    ----------
    path : Path
        In a folder that exists.
    text : str
        Written as UTF-8.
    mode : int
        Permissions of the file, before the umask.

    Raises
    ------
    OSError
        If it can't be written.
    """
    # Threads, and containers that share a folder, have equal process ids.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

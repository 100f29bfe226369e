"""Writes a file atomically: as a whole or not at all.

Knows nothing of its content.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole_file(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write UTF-8 text to a temporary file and rename it, so that a failure leaves the old content untouched."""
    # Not the process id: threads share it, and containers that share a folder may have equal ones.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

"""Files that later runs of this user read again, where there is a folder for them.

Knows no profile and no plan; what can't be kept costs the next start time, and no more.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lingualinked.whole_file import write_whole_file


def read_kept(name: str) -> bytes | None:
    """Return what was kept under a name; ``None`` if nothing was, or it can't be read."""
    folder = _folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            return (folder / name).read_bytes()
    return None


def keep(name: str, text: str) -> None:
    """Keep text for this user alone, if there is a folder that can be written to."""
    folder = _folder()
    if folder is not None:
        with contextlib.suppress(OSError):  # a disk that is full or read-only
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            write_whole_file(folder / name, text, mode=0o600)


def _folder() -> Path | None:
    parent = os.environ.get("XDG_CACHE_HOME", "")
    if Path(parent).is_absolute():
        return Path(parent) / "lingualinked"
    try:
        return Path.home() / ".cache" / "lingualinked"
    except RuntimeError:  # the user has no home
        return None

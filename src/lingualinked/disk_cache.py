"""Files in the user's cache folder, which later runs read again.

Knows no profile and no plan. A failure to read or write only costs time, so it is not reported.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from lingualinked.whole_file import write_whole_file


def read_cached(name: str) -> bytes | None:
    """Return the content of a file in the cache folder; ``None`` if it can't be read."""
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            return (folder / name).read_bytes()
    return None


def write_cached(name: str, text: str) -> None:
    """Write a file that only this user can read, if the cache folder can be written to."""
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):  # a disk that is full or read-only
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            write_whole_file(folder / name, text, mode=0o600)


def cache_folder() -> Path | None:
    """Return the library's folder in the user's cache folder; ``None`` if the user has none."""
    parent = os.environ.get("XDG_CACHE_HOME", "")
    if Path(parent).is_absolute():
        return Path(parent) / "lingualinked"
    try:
        return Path.home() / ".cache" / "lingualinked"
    except RuntimeError:  # the user has no home folder
        return None


def free_cache_bytes() -> int | None:
    """Return the free disk space where the cache folder is, or will be made; ``None`` if it can't be found out."""
    folder = cache_folder()
    for each in () if folder is None else (folder, *folder.parents):
        with contextlib.suppress(OSError):  # it is made when it is needed
            return shutil.disk_usage(each).free
    return None

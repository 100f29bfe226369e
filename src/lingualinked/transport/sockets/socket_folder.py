"""Folders for unix sockets: closed to other users, and short enough for an address.

Knows the file system only; not which sockets lie there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lingualinked.errors import ResourceError

_MAX_ADDRESS_BYTES = 107 if sys.platform == "linux" else 103
_PREFIX = "lingualinked-"
# The folder's name with mkdtemp's suffix, a number for each cluster, and the socket's own name.
_NAME_BYTES = len("/") + len(_PREFIX) + 8 + len("/") + 6 + len("/") + 8
_LAST_RESORT = "/tmp"  # noqa: S108 - the folder made there is closed to others


def make_socket_folder() -> str:
    """Make a folder that no other user can enter, in ``XDG_RUNTIME_DIR`` if it is private, else among temporary files."""
    obstacles = []
    for parent in _parents():
        if len(os.fsencode(parent)) + _NAME_BYTES > _MAX_ADDRESS_BYTES:
            obstacles.append(f"{parent!r} is too long for the address of a socket")
            continue
        try:
            return tempfile.mkdtemp(prefix=_PREFIX, dir=parent)  # of mode 0700, whatever the umask
        except OSError as error:
            obstacles.append(f"{parent!r}: {error.strerror}")
    raise ResourceError(
        f"no folder can hold the sockets ({'; '.join(obstacles)}): set TMPDIR to a short path that this user can write to"
    )


def new_socket_path(folder: str) -> str:
    """Return a path in a folder of sockets that is never used twice."""
    return os.path.join(folder, secrets.token_hex(4))  # noqa: PTH118 - text, as in addresses


def _parents() -> Iterator[str]:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if Path(runtime).is_absolute() and _is_private(runtime):
        yield runtime
    with contextlib.suppress(FileNotFoundError):  # raised if no folder is writable
        yield tempfile.gettempdir()
    yield _LAST_RESORT


def _is_private(folder: str) -> bool:
    """Return whether a folder belongs to this user and only this user may write to it."""
    try:
        status = Path(folder).stat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022

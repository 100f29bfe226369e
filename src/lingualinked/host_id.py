"""Which processes can share memory: those of one host, in the same namespaces, of one user.

Knows what Linux says of this process.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

_SAYING = ("/proc/sys/kernel/random/boot_id",)
_NAMED_BY = ("/proc/self/ns/net", "/proc/self/ns/pid")


def host_id() -> str:
    """Return a text that two processes have in common if they can open each other's memory and unix sockets."""
    said = [platform.node(), str(os.getuid()) if hasattr(os, "getuid") else ""]
    for read, paths in (
        (lambda path: path.read_text().strip(), _SAYING),
        (lambda path: str(path.readlink()), _NAMED_BY),
    ):
        for path in paths:
            try:
                said.append(read(Path(path)))
            except OSError:
                said.append(f"{path} of process {os.getpid()}")  # nobody else's: they do without
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:32]

"""A process started for the caller, and the socket that is its standard input and its lifeline.

Knows `subprocess` and the messages of `lingualinked.protocol.boot`; not what the process does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from lingualinked.protocol.boot import GRACE_S, Preload

_TAIL_BYTES = 4000
_ENTRY = str(Path(__file__).parents[1] / "worker" / "__main__.py")


class ServerProcess:
    """A process started by `subprocess`: a fork server, or a worker of its own."""

    def __init__(self, preload: Preload, errors: ErrorFile) -> None:
        self.channel, theirs = socket.socketpair()
        try:
            with theirs:
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", _ENTRY],
                    stdin=theirs.fileno(),
                    stdout=errors.fileno(),
                    stderr=errors.fileno(),
                    start_new_session=True,  # Ctrl-C in the caller's terminal is the caller's business
                    cwd=Path(_ENTRY).anchor,  # the caller's own may be gone
                    umask=0o077,
                    env=worker_environment(),
                )
        except BaseException:
            self.channel.close()
            raise
        self.pid = self._popen.pid
        self.handle = open_pidfd(self.pid)
        self._send(json.dumps(import_path()).encode() + b"\n")
        self._send(msgspec.json.encode(preload) + b"\n")

    def connect(self, channel: int, errors: int) -> None:
        """Hand a fork server the socket to one more cluster, and the file for that cluster's errors."""
        with contextlib.suppress(OSError):
            socket.send_fds(self.channel, [b"\0"], [channel, errors])

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._popen.poll() is not None

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; ``None`` while it runs."""
        return self._popen.poll()

    def hang_up(self) -> None:
        """Hang up, which ends the process."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # closing would not be seen while a child of ours holds a copy

    def kill(self) -> None:
        """Force its end."""
        self._popen.kill()

    def end_by(self, deadline: float) -> None:
        """Wait for the end until ``deadline`` (monotonic seconds), then force it."""
        self.channel.close()
        if self.handle is not None:
            if not wait_for_end(self.handle, deadline):
                self.kill()
            os.close(self.handle)
            self.handle = None
        try:
            self._popen.wait(max(GRACE_S, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            self._popen.wait()

    def detach_after_fork(self) -> None:
        """Close its descriptors in a forked child of the caller: the process belongs to the parent."""
        self.channel.close()
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
        self._popen.returncode = 0  # not a child of ours: nothing to wait for

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a process that is gone already is seen, and told, by who watches it
            self.channel.sendall(data)


class ErrorFile:
    """What processes write to their standard error, kept in a file without a name."""

    def __init__(self, folder: str) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as those that write to it

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._file.fileno()

    def tail(self) -> str:
        """Return the last lines; none once it is closed."""
        with contextlib.suppress(ValueError, OSError):
            size = os.fstat(self.fileno()).st_size
            tail = os.pread(self.fileno(), 4 * _TAIL_BYTES, max(0, size - 4 * _TAIL_BYTES)).decode(errors="replace")
            # Of faulthandler's report of a crash this one line is most, and it says nothing.
            lines = [line for line in tail.splitlines() if not line.startswith("Extension modules:")]
            return "\n".join(lines)[-_TAIL_BYTES:].strip()
        return ""

    def close(self) -> None:
        """Close this process's descriptor of it."""
        self._file.close()


def open_pidfd(pid: int) -> int | None:
    """Open a descriptor that becomes readable when a process ends; ``None`` where the system has no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def wait_for_end(handle: int, deadline: float) -> bool:
    """Wait until ``deadline`` (monotonic seconds) for the process of a pidfd to end; say whether it has."""
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))


def how_it_ended(exit_code: int | None) -> str:
    """Put an exit code, or minus the number of a signal, into words; ``None``: neither is known."""
    if exit_code is None:
        return "it ended"
    if exit_code < 0:
        hint = ", as when memory runs out" if exit_code == -signal.SIGKILL else ""
        return f"killed by signal {-exit_code}, {signal.strsignal(-exit_code)}{hint}"
    return f"exit status {exit_code}"


def import_path() -> list[str]:
    """Return the caller's import path, in absolute terms, but without the folder of its script and the working folder."""
    package_home = str(Path(__file__).parents[2])
    working_folder = None
    with contextlib.suppress(OSError):  # it may be gone
        working_folder = str(Path.cwd())
    unwanted = {"", working_folder}
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script and (working_folder or Path(script).is_absolute()):
        unwanted.add(str(Path(script).resolve().parent))
    path = [
        str(Path(entry).absolute()) if working_folder else entry
        for entry in sys.path
        # Python itself ignores entries that are no text, as of pathlib.
        if isinstance(entry, str) and (entry == package_home or entry not in unwanted)
    ]
    return path if package_home in path else [package_home, *path]


def worker_environment() -> dict[str, str]:
    """Return the environment that workers start with: the caller's, and what torch reads when it is imported."""
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "OPENBLAS_NUM_THREADS": "1",  # its pool would start at import, before the fork
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for CUDA must not start it before the fork
        "THP_MEM_ALLOC_ENABLE": "1",  # weights in huge pages: fewer misses while they stream, no bit changed
    }

"""A process started for a cluster, and the socket that is its standard input and its lifeline.

Knows `subprocess` and the lines of `lingualinked.protocol.boot`; not what the process does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from lingualinked.protocol.boot import GRACE_S, Boot, Ended, Forked, Preload

_MOST_HANDLES = 64


class ServerProcess:
    """A process started by `subprocess`: the fork server, or a worker of its own.

    Parameters
    ----------
    preload : Preload
        What it is told first.
    errors : int
        Descriptor of the file for its standard output and error.
    """

    def __init__(self, preload: Preload, errors: int) -> None:
        self.hung_up = False
        self._text = b""
        self._handles: list[int] = []
        self.channel, theirs = socket.socketpair()
        try:
            with theirs:
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", "lingualinked.worker"],
                    stdin=theirs.fileno(),
                    stdout=errors,
                    stderr=errors,
                    start_new_session=True,  # Ctrl-C in the caller's terminal is the caller's business
                    env=_environment(),
                )
        except BaseException:
            self.channel.close()
            raise
        self.pid = self._popen.pid
        self.handle = open_pidfd(self.pid)
        self._tell(preload)

    def boot(self, boot: Boot) -> None:
        """Ask for a worker, or make this process one."""
        self._tell(boot)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._popen.poll() is not None

    @property
    def status(self) -> int | None:
        """How it ended, as ``waitpid`` would put it."""
        code = self._popen.poll()
        return None if code is None else -code if code < 0 else code << 8

    def read(self) -> list[tuple[Forked | Ended, int | None]]:
        """Read what it says, with the descriptor that travels beside a `Forked`; its channel must be readable."""
        try:
            data, handles, _, _ = socket.recv_fds(self.channel, 65536, _MOST_HANDLES)
        except OSError:
            data, handles = b"", []
        for handle in handles:
            os.set_inheritable(handle, False)  # else whatever the caller executes would hold it too
        self.hung_up = not data
        self._handles += handles
        *lines, self._text = (self._text + data).split(b"\n")
        said = [msgspec.json.decode(line, type=Forked | Ended) for line in lines]
        return [(line, self._handles.pop(0) if isinstance(line, Forked) else None) for line in said]

    def hang_up(self) -> None:
        """Let the process and its workers see that the caller is done with them."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # closing would not be seen while a child of ours holds a copy

    def kill(self) -> None:
        """Force its end."""
        self._popen.kill()

    def end_by(self, deadline: float) -> None:
        """Wait for the end until ``deadline`` (monotonic seconds), then force it."""
        self.channel.close()
        while self._handles:  # of workers whose line had not come whole
            os.close(self._handles.pop())
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

    def abandon(self) -> None:
        """Let go of it in a forked child of the caller: it is the parent's."""
        self.channel.close()
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
        self._popen.returncode = 0  # not a child of ours: nothing to wait for

    def _tell(self, line: Preload | Boot) -> None:
        with contextlib.suppress(OSError):  # a process that is gone already is seen, and told, by who watches it
            self.channel.sendall(msgspec.json.encode(line) + b"\n")


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


def how_it_ended(status: int | None) -> str:
    """Put a ``waitpid`` status into words."""
    if status is None:
        return "it ended"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hint = ", as when memory runs out" if number == signal.SIGKILL else ""
        return f"killed by signal {number}, {signal.strsignal(number)}{hint}"
    return f"exit status {os.WEXITSTATUS(status)}"


def _environment() -> dict[str, str]:
    """Make the workers' environment: ours, with the caller's import path, but without the folder of its script."""
    package_home = str(Path(__file__).parents[2])
    unwanted = {""}
    with contextlib.suppress(OSError):  # the working folder may be gone
        unwanted.add(str(Path.cwd()))
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script:
        unwanted.add(str(Path(script).resolve().parent))
    path = [entry for entry in sys.path if entry == package_home or entry not in unwanted]
    if package_home not in path:
        path.insert(0, package_home)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "OPENBLAS_NUM_THREADS": "1",  # its pool would start at import, before the fork
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for CUDA must not start it before the fork
        "THP_MEM_ALLOC_ENABLE": "1",  # weights in huge pages: fewer misses while they stream, no bit changed
    }

"""Starts worker processes, notices when they end, and ends them.

Knows processes and pipes only: no torch, no zmq, so that workers can start before the caller has imported either.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import msgspec

from lingualinked.protocol.boot import Boot, Ended, Forked, Preload

GRACE_S = 2.0
"""How long workers get to end by themselves before they are killed."""

_TAIL_BYTES = 4000
_POLL_MS = 200

_launchers: weakref.WeakSet[Launcher] = weakref.WeakSet()


def _close_in_forked_child() -> None:
    for launcher in _launchers:
        launcher.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_forked_child)


class Launcher:
    """The worker processes of one cluster.

    On Linux one fork server imports torch and transformers once and forks every worker; elsewhere, where forking a
    process that has loaded such libraries is unsafe, every worker is started plainly.

    Parameters
    ----------
    class_names : tuple of str
        transformers classes whose code the workers will need.
    forks : bool or None
        Whether to use a fork server; ``None``: on Linux.
    """

    def __init__(self, class_names: tuple[str, ...] = (), *, forks: bool | None = None) -> None:
        self.forks = sys.platform == "linux" if forks is None else forks
        self._preload = Preload(caller_pid=os.getpid(), class_names=class_names)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the workers that write to it
        self._lock = threading.Lock()
        self._processes: dict[str, _Process] = {}
        self._on_end: Callable[[str, str], None] = lambda name, how: None
        self._woken, self._wake = socket.socketpair()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._server = _Server(self._preload, self._errors.fileno()) if self.forks else None
        _launchers.add(self)

    def start(self, boots: list[Boot], on_end: Callable[[str, str], None]) -> None:
        """Start one worker per boot record.

        Parameters
        ----------
        boots : list of Boot
            Who each worker is.
        on_end : callable
            Told the name of a worker that ended, and how, on a thread of this launcher.
        """
        self._on_end = on_end
        for boot in boots:
            server = self._server or _Server(self._preload, self._errors.fileno())
            self._processes[boot.name] = _Process(boot.name, server)
            with contextlib.suppress(OSError):  # a server that is gone is seen, and told, by the watching thread
                server.channel.sendall(msgspec.json.encode(boot) + b"\n")
        self._thread = threading.Thread(target=self._watch, name="lingualinked-processes", daemon=True)
        self._thread.start()

    def pids(self) -> dict[str, int]:
        """Process ids of the workers that have started, by device name."""
        with self._lock:
            return {name: process.pid for name, process in self._processes.items() if process.pid is not None}

    def stop(self) -> None:
        """End every process: first by hanging up, then by force; returns once they are gone."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._wake.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(GRACE_S)
        servers = {process.server for process in self._processes.values()} | ({self._server} - {None})
        for server in servers:
            server.channel.close()
        deadline = time.monotonic() + GRACE_S
        for process in self._processes.values():
            process.end_by(deadline)
        for server in servers:
            server.end_by(deadline)
        self._woken.close()
        self._errors.close()

    def abandon(self) -> None:
        """Let go of the workers in a forked child of the caller: they belong to the parent."""
        self._stopping = True
        for server in {process.server for process in self._processes.values()} | ({self._server} - {None}):
            with contextlib.suppress(OSError):
                server.channel.close()
            server.popen.returncode = 0  # not a child of ours: nothing to wait for

    def error_tail(self) -> str:
        """The last lines that workers wrote to their standard error."""
        with contextlib.suppress(ValueError, OSError):
            size = os.fstat(self._errors.fileno()).st_size
            return os.pread(self._errors.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")
        return ""

    def _watch(self) -> None:
        """Read what the fork server says and see processes end, until `stop`."""
        while True:
            poller = select.poll()
            poller.register(self._woken, select.POLLIN)
            timeout_ms: int | None = None
            for descriptor in self._descriptors():
                if descriptor is None:
                    timeout_ms = _POLL_MS  # no pidfd for it here
                else:
                    poller.register(descriptor, select.POLLIN)
            ready = {descriptor for descriptor, _ in poller.poll(timeout_ms)}
            if self._stopping:
                return
            if self._server is not None and self._server.channel.fileno() in ready:
                for line, handle in self._server.read():
                    self._note(line, handle)
            for name, how in self._newly_ended(ready):
                tail = self.error_tail().strip()
                self._on_end(name, f"{how}; its last words:\n{tail}" if tail else how)

    def _descriptors(self) -> list[int | None]:
        """What to wait for. While the fork server lives it tells of ends, and of how; then only pidfds do."""
        if self._server is None:
            return [process.server.handle for process in self._processes.values() if not process.ended]
        own = [] if self._server.hung_up else [self._server.channel.fileno()]
        if not self._server.ended:
            return [*own, self._server.handle]
        return [*own, *(process.handle for process in self._processes.values() if not process.ended)]

    def _note(self, line: Forked | Ended, handle: int | None) -> None:
        with self._lock:
            if isinstance(line, Forked):
                self._processes[line.name].pid = line.pid
                self._processes[line.name].handle = handle
                return
            for process in self._processes.values():
                if process.pid == line.pid:
                    process.how = _how(line.status)

    def _newly_ended(self, ready: set[int]) -> list[tuple[str, str]]:
        ended = []
        with self._lock:
            for process in self._processes.values():
                if process.ended:
                    continue
                if process.how is None and process.server.ended and (process.handle is None or process.handle in ready):
                    process.how = _how(process.server.status if process.handle is None else None)
                if process.how is not None:
                    process.ended = True
                    ended.append((process.name, process.how))
        return ended


class _Server:
    """A process started by `subprocess`: the fork server, or a worker of its own."""

    def __init__(self, preload: Preload, errors: int) -> None:
        self.channel, theirs = socket.socketpair()
        self.hung_up = False
        self._text = b""
        self._handles: list[int] = []
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "lingualinked.worker"],
                stdin=theirs.fileno(),
                stdout=errors,
                stderr=errors,
                start_new_session=True,  # Ctrl-C in the caller's terminal is the caller's business
                env=_environment(),
            )
        self.handle = os.pidfd_open(self.popen.pid) if hasattr(os, "pidfd_open") else None
        self.channel.sendall(msgspec.json.encode(preload) + b"\n")

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    @property
    def status(self) -> int | None:
        """How it ended, as ``waitpid`` would put it."""
        code = self.popen.poll()
        return None if code is None else -code if code < 0 else code << 8

    def read(self) -> list[tuple[Forked | Ended, int | None]]:
        """Read what it says, with the descriptor that travels beside a `Forked`."""
        try:
            data, handles, _, _ = socket.recv_fds(self.channel, 65536, 64)
        except OSError:
            data, handles = b"", []
        self.hung_up = not data
        self._handles += handles
        *lines, self._text = (self._text + data).split(b"\n")
        said = [msgspec.json.decode(line, type=Forked | Ended) for line in lines]
        return [(line, self._handles.pop(0) if isinstance(line, Forked) else None) for line in said]

    def end_by(self, deadline: float) -> None:
        """Wait for the end until ``deadline`` (monotonic seconds), then force it."""
        try:
            self.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


class _Process:
    """One worker, as far as it is known; in plain starts its server is the worker itself."""

    def __init__(self, name: str, server: _Server) -> None:
        self.name = name
        self.server = server
        self.pid: int | None = None
        self.handle: int | None = None  # pidfd of a forked worker: readable once it has ended
        self.how: str | None = None
        self.ended = False

    def end_by(self, deadline: float) -> None:
        """Wait for a forked worker's end until ``deadline`` (monotonic seconds), then force it."""
        if self.handle is None:
            return
        if not select.select([self.handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            select.select([self.handle], [], [], GRACE_S)
        os.close(self.handle)
        self.handle = None


def _how(status: int | None) -> str:
    """Put a ``waitpid`` status into words."""
    if status is None:
        return "it ended"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hint = ", as when memory runs out" if number == signal.SIGKILL else ""
        return f"killed by signal {number}, {signal.Signals(number).name}{hint}"
    return f"exit status {os.WEXITSTATUS(status)}"


def _environment() -> dict[str, str]:
    """The workers' environment: ours, with the caller's import path, but without the folder of its script."""
    package_home = str(Path(__file__).parents[2])
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    unwanted = {"", os.getcwd(), str(Path(script).resolve().parent) if script else ""} - {package_home}
    path = [entry for entry in sys.path if entry not in unwanted]
    if package_home not in path:
        path.insert(0, package_home)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"}

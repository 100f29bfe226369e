"""Starts worker processes, notices when they end, and ends them.

Knows processes and pipes only: no torch, no zmq, so that workers can start before the caller has imported either.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable

from lingualinked.cluster.booting import Booting
from lingualinked.cluster.fork_server import ForkChannel, ForkServer, fork_servers
from lingualinked.cluster.resources import start_thread
from lingualinked.cluster.server_process import ErrorFile, ServerProcess, how_it_ended, open_pidfd, wait_for_end
from lingualinked.protocol.boot import GRACE_S, Boot, Preload, WorkerEnded, WorkerForked
from lingualinked.transport.socket_folder import make_socket_folder

_POLL_MS = 200

_launchers: weakref.WeakSet[Launcher] = weakref.WeakSet()


def _abandon_in_forked_child() -> None:
    for launcher in _launchers:
        launcher.abandon()
    fork_servers.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_forked_child)


class Launcher:
    """The worker processes of one cluster.

    On Linux a fork server imports torch and transformers once and forks every worker, for all clusters of this process;
    elsewhere, where forking a process that has loaded such libraries is unsafe, every worker is started plainly.

    Parameters
    ----------
    class_names : tuple of str
        transformers classes whose code the workers will need.
    forks : bool or None
        Whether to use a fork server; ``None``: on Linux.

    Attributes
    ----------
    socket_folder : str
        Where the sockets of the cluster are to lie; it goes with the launcher.

    Raises
    ------
    ResourceError
        If there is no folder for sockets.
    """

    def __init__(self, class_names: tuple[str, ...] = (), *, forks: bool | None = None) -> None:
        self._class_names = class_names
        self._lock = threading.Lock()
        self._stop_lock = threading.RLock()
        self._stopping = False
        self._processes: list[_Process] = []
        self._admit: Callable[[str, str], None] = lambda name, public_key: None
        self._on_end: Callable[[str, str], None] = lambda name, how: None
        self._thread: threading.Thread | None = None
        self._fork_server: ForkServer | None = None
        self._channel: ForkChannel | None = None
        with contextlib.ExitStack() as undo:
            if _can_fork() if forks is None else forks:
                self._fork_server = server = fork_servers.acquire(class_names)
                undo.callback(fork_servers.release, server)
                self.socket_folder = server.make_folder()
            else:
                self.socket_folder = make_socket_folder()
            undo.callback(shutil.rmtree, self.socket_folder, ignore_errors=True)
            self._errors = undo.enter_context(contextlib.closing(ErrorFile(self.socket_folder)))
            self._woken, self._wake = socket.socketpair()
            undo.callback(self._woken.close)
            undo.callback(self._wake.close)
            self._wake.setblocking(False)
            if self._fork_server is not None:
                self._channel = ForkChannel(self._fork_server, self._errors)
            undo.pop_all()
        _launchers.add(self)

    def start(self, boots: list[Boot], admit: Callable[[str, str], None], on_end: Callable[[str, str], None]) -> None:
        """Start one worker per boot record.

        Parameters
        ----------
        boots : list of Boot
            Who each worker is.
        admit : callable
            Lets a worker connect, by name and public key, before it is told who it is; on a thread of this launcher.
        on_end : callable
            Told the name of a worker that ended, and how, on a thread of this launcher.
        """
        self._admit, self._on_end = admit, on_end
        for boot in boots:
            self._begin(boot)
        thread = threading.Thread(target=self._watch, name="lingualinked-processes", daemon=True)
        start_thread(thread)
        self._thread = thread  # only now: what did not start can't be joined

    def add(self, boot: Boot) -> None:
        """Start one more worker beside those that run; does nothing once stopped."""
        with self._stop_lock:
            if not self._stopping:
                self._begin(boot)
                self._wake_watcher()

    def remove(self, name: str) -> None:
        """Force a worker's end and forget it, without a word to who is told of ends; does nothing once stopped.

        Returns once it is gone; one that is still to be forked is gone as soon as it is there.
        """
        with self._stop_lock:
            process = None if self._stopping else next((each for each in self._kept() if each.name == name), None)
            if process is None:
                return
            with self._lock:
                process.given_up = True
                process.kill()
                has_started = process.pid is not None
            self._wake_watcher()
        if has_started:
            process.gone.wait(GRACE_S)

    def pids(self) -> dict[str, int]:
        """Process ids of the workers that have started and not ended, by device name."""
        living = [process for process in self._kept() if not process.ended]
        return {process.name: process.pid for process in living if process.pid is not None}

    def stop(self) -> None:
        """End every process: first by hanging up, then by force; returns once they are gone."""
        with self._stop_lock:
            if self._stopping:
                return
            self._stopping = True
            if self._channel is not None:
                self._channel.hang_up()
            for process in self._processes:
                process.hang_up()
            self._wake.close()
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join(GRACE_S)
            deadline = time.monotonic() + GRACE_S
            for process in self._processes:
                process.end_by(deadline)
            if self._channel is not None:
                self._channel.close_by(deadline)
            if self._fork_server is not None:
                fork_servers.release(self._fork_server)
            self._woken.close()
            self._errors.close()
            shutil.rmtree(self.socket_folder, ignore_errors=True)

    def abandon(self) -> None:
        """Let go of the workers in a forked child of the caller: they belong to the parent."""
        self._stopping = True
        self._stop_lock = threading.RLock()  # whoever held it is not in this process
        if self._channel is not None:
            self._channel.abandon()
        for process in self._processes:
            process.abandon()
        self._wake.close()
        self._woken.close()
        self._errors.close()

    def _begin(self, boot: Boot) -> None:
        if self._channel is not None:
            ours, theirs = socket.socketpair()
            with self._lock:
                self._processes.append(_Process(Booting(ours, boot), boot.name, None))
            self._channel.fork(boot.name, self._class_names, theirs)
        else:
            plain = ServerProcess(
                Preload(
                    caller_pid=os.getpid(),
                    forks=False,
                    socket_folder=self.socket_folder,
                    class_names=self._class_names,
                ),
                self._errors,
            )
            with self._lock:
                self._processes.append(_Process(Booting(plain.channel.dup(), boot), boot.name, plain))

    def _kept(self) -> list[_Process]:
        with self._lock:
            return [process for process in self._processes if not process.given_up]

    def _wake_watcher(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is about to wake
            self._wake.send(b"\0")

    def _watch(self) -> None:
        """Read what the fork server says and see processes end, until `stop`."""
        while True:
            server = self._fork_server
            server_has_ended = server is not None and server.process.ended  # asked first: all that it said can be read
            poller = select.poll()
            poller.register(self._woken, select.POLLIN)
            descriptors = self._descriptors(server_has_ended)
            booting = self._booting()
            for descriptor in (*descriptors, *booting):
                if descriptor is not None:
                    poller.register(descriptor, select.POLLIN)
            # Where a process has no pidfd there is nothing to wait for but time.
            ready = {descriptor for descriptor, _ in poller.poll(_POLL_MS if None in descriptors else None)}
            if self._stopping:
                return
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
            for descriptor in ready & booting.keys():
                booting[descriptor].answer(self._admit)
            if self._channel is not None and self._channel.fileno() in ready:
                for line, handle in self._channel.read():
                    self._note(line, handle)
                server_has_ended = False  # for now: it may have said more
            for name, how in self._newly_ended(ready, server_has_ended):
                tail = self._errors.tail()
                self._on_end(name, f"{how}; last words of this cluster's workers:\n{tail}" if tail else how)
            self._clear_away()

    def _descriptors(self, server_has_ended: bool) -> list[int | None]:
        """Say what to wait for: while the fork server lives it tells of ends, and of how; then only pidfds do."""
        with self._lock:
            handles = [process.handle for process in self._processes if not process.ended]
        if self._fork_server is None or self._channel is None:
            return handles
        channel = [] if self._channel.hung_up else [self._channel.fileno()]
        return [*channel, *(handles if server_has_ended else [self._fork_server.process.handle])]

    def _booting(self) -> dict[int, Booting]:
        """Return the conversations with workers that are not yet told who they are, by descriptor."""
        with self._lock:
            return {
                process.booting.fileno(): process.booting
                for process in self._processes
                if not process.given_up and process.booting.fileno() >= 0
            }

    def _note(self, line: WorkerForked | WorkerEnded, handle: int | None) -> None:
        with self._lock:
            if isinstance(line, WorkerForked):  # in the order in which they were asked for
                process = next(each for each in self._processes if each.name == line.name and each.pid is None)
                process.pid, process.handle = line.pid, handle
                if process.given_up:
                    process.kill()
                return
            for process in self._processes:
                if process.pid == line.pid:
                    process.how = how_it_ended(line.status)

    def _newly_ended(self, ready: set[int], server_has_ended: bool) -> list[tuple[str, str]]:
        ended = []
        with self._lock:
            for process in self._processes:
                how = None if process.ended else self._how(process, ready, server_has_ended)
                if how is not None:
                    process.ended = True
                    if not process.given_up:
                        ended.append((process.name, how))
        return ended

    def _clear_away(self) -> None:
        """Forget the workers that were given up and have ended; only here, where no poll holds their descriptors."""
        with self._lock:
            done = [process for process in self._processes if process.given_up and process.ended]
            for process in done:
                self._processes.remove(process)
        for process in done:
            process.end_by(time.monotonic())
            process.gone.set()

    def _how(self, process: _Process, ready: set[int], server_has_ended: bool) -> str | None:
        if process.how is not None:
            return process.how
        if process.plain is not None:
            return how_it_ended(process.plain.status) if process.plain.ended else None
        if process.handle is not None:
            return how_it_ended(None) if server_has_ended and process.handle in ready else None
        if server_has_ended and self._fork_server is not None:
            tail = self._fork_server.errors.tail()
            last_words = f"; its last words:\n{tail}" if tail else ""
            how = how_it_ended(self._fork_server.process.status)
            return f"it was not started: the process that forks this cluster's workers had ended, {how}{last_words}"
        return None


class _Process:
    """One worker, if known: started plainly, or forked and known once the fork server says so."""

    def __init__(self, booting: Booting, name: str, plain: ServerProcess | None) -> None:
        self.booting = booting
        self.name = name
        self.plain = plain
        self.pid = None if plain is None else plain.pid
        self.handle = None if plain is None else plain.handle  # pidfd: readable once it has ended
        self.how: str | None = None
        self.ended = False
        self.given_up = False  # nobody is told of its end
        self.gone = threading.Event()

    def hang_up(self) -> None:
        """Let a plain worker see that the caller is done with it; forked ones see it by their cluster's channel."""
        if self.plain is not None:
            self.plain.hang_up()

    def kill(self) -> None:
        """Force its end, if it has begun."""
        if self.plain is not None:
            self.plain.kill()
        elif self.handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def end_by(self, deadline: float) -> None:
        """Wait for its end until ``deadline`` (monotonic seconds), then force it."""
        self.booting.close()
        if self.plain is not None:
            self.plain.end_by(deadline)
        elif self.handle is not None:
            if not wait_for_end(self.handle, deadline):
                self.kill()
                wait_for_end(self.handle, time.monotonic() + GRACE_S)
            os.close(self.handle)
        self.handle = None

    def abandon(self) -> None:
        """Let go of it in a forked child of the caller."""
        self.booting.close()
        if self.plain is not None:
            self.plain.abandon()
        elif self.handle is not None:
            os.close(self.handle)
        self.handle = None


def _can_fork() -> bool:
    """Whether a process with torch in it may be forked here, and its children be watched by others."""
    handle = open_pidfd(os.getpid()) if sys.platform == "linux" else None
    if handle is None:
        return False
    os.close(handle)
    return True

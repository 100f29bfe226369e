"""Starts worker processes, notices when they end, and ends them.

Knows no torch and no zmq, so that workers can start before the caller has imported either; nor which way they start.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lingualinked.errors import LingualinkedError
from lingualinked.processes.fork_server import fork_servers
from lingualinked.processes.forked_workers import ForkedWorkers
from lingualinked.processes.resources import start_thread
from lingualinked.processes.server_process import open_pidfd
from lingualinked.processes.spawned_workers import SpawnedWorkers
from lingualinked.processes.worker_starter import WorkerProcess, WorkerStarter
from lingualinked.protocol.boot import GRACE_S, Boot

_POLL_MS = 200

_launchers: weakref.WeakSet[Launcher] = weakref.WeakSet()


def _detach_after_fork() -> None:
    for launcher in _launchers:
        launcher.detach_after_fork()
    fork_servers.detach_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_detach_after_fork)


class Launcher:
    """The worker processes of one cluster.

    On Linux a fork server imports torch and transformers once and forks every worker, for all clusters of this process;
    elsewhere, where forking a process that has loaded such libraries is unsafe, every worker is started plainly.
    """

    def __init__(self, class_names: tuple[str, ...] = (), *, forks: bool | None = None) -> None:
        self._lock = threading.Lock()
        self._stop_lock = threading.RLock()
        self._stopping = False
        self._processes: list[WorkerProcess] = []
        self._on_key: Callable[[str, str], None] = lambda name, public_key: None
        self._on_end: Callable[[str, str], None] = lambda name, how: None
        self._thread: threading.Thread | None = None
        self._starter: WorkerStarter[Any]
        if _can_fork() if forks is None else forks:
            self._starter = ForkedWorkers(class_names)
        else:
            self._starter = SpawnedWorkers(class_names)
        try:
            self._woken, self._wake = socket.socketpair()
        except BaseException:
            self._starter.close_by(time.monotonic())
            raise
        self._wake.setblocking(False)
        _launchers.add(self)

    @property
    def socket_folder(self) -> str:
        """Where the sockets of the cluster are to lie; it goes with the launcher."""
        return self._starter.socket_folder

    def start(
        self, names: Iterable[str], on_key: Callable[[str, str], None], on_end: Callable[[str, str], None]
    ) -> None:
        """Start one worker per name.

        On a thread of this launcher, ``on_key`` is told the name of a worker and the public key that it has made, upon
        which `boot` is to tell the worker who it is, and ``on_end`` the name of a worker that has ended, and how.
        """
        self._on_key, self._on_end = on_key, on_end
        for name in names:
            self._starter.start(name, self._register)
        thread = threading.Thread(target=self._watch, name="lingualinked-processes", daemon=True)
        start_thread(thread)
        self._thread = thread  # only now: what did not start can't be joined

    def add(self, name: str) -> None:
        """Start one more worker beside those that run; does nothing once stopped."""
        with self._stop_lock:
            if not self._stopping:
                self._starter.start(name, self._register)
                self._wake_watcher()

    def boot(self, boot: Boot) -> None:
        """Tell the worker of that name who it is, once it has said its key; does nothing for one that is given up."""
        for process in self._kept():
            if process.name == boot.name:
                process.booting.send_boot(boot)

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
            self._starter.hang_up(self._processes)
            self._wake.close()
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join(GRACE_S)
            deadline = time.monotonic() + GRACE_S
            for process in self._processes:
                process.end_by(deadline)
            self._starter.close_by(deadline)
            self._woken.close()

    def detach_after_fork(self) -> None:
        """Close the workers' descriptors in a forked child of the caller: the workers belong to the parent."""
        self._stopping = True
        self._stop_lock = threading.RLock()  # whoever held it is not in this process
        self._starter.detach_after_fork()
        for process in self._processes:
            process.detach_after_fork()
        self._wake.close()
        self._woken.close()

    def _register(self, process: WorkerProcess) -> None:
        with self._lock:
            self._processes.append(process)

    def _kept(self) -> list[WorkerProcess]:
        with self._lock:
            return [process for process in self._processes if not process.given_up]

    def _wake_watcher(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is about to wake
            self._wake.send(b"\0")

    def _watch(self) -> None:
        """Let workers in, and see them end, until `stop`."""
        while True:
            # 1) wait for a word of a worker that starts, for the end of one, or for who wants this thread to look again
            poller = select.poll()
            poller.register(self._woken, select.POLLIN)
            with self._lock:
                descriptors = self._starter.descriptors([each for each in self._processes if not each.ended])
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
            # 2) report the keys that workers have made
            for descriptor in ready & booting.keys():
                self._read_key(booting[descriptor])
            # 3) tell of those that have ended
            for name, how in self._newly_ended(ready):
                tail = self._starter.errors.tail()
                self._on_end(name, f"{how}; last words of this cluster's workers:\n{tail}" if tail else how)
            self._reap()

    def _booting(self) -> dict[int, WorkerProcess]:
        """Return the workers that have not said their key, by the descriptor on which they will."""
        with self._lock:
            return {
                process.booting.fileno(): process
                for process in self._processes
                if not process.given_up and process.booting.fileno() >= 0
            }

    def _read_key(self, process: WorkerProcess) -> None:
        public_key = process.booting.read_key()
        if public_key is not None:
            try:
                self._on_key(process.name, public_key)
            except LingualinkedError:
                process.booting.close()  # it ends, which is seen here and reported

    def _newly_ended(self, ready: set[int]) -> list[tuple[str, str]]:
        ended = []
        with self._lock:
            self._starter.read(ready, self._processes)
            for process in self._processes:
                how = None if process.ended else self._starter.how_ended(process, ready)
                if how is not None:
                    process.ended = True
                    if not process.given_up:
                        ended.append((process.name, how))
        return ended

    def _reap(self) -> None:
        """Forget the workers that were given up and have ended; only here, where no poll holds their descriptors."""
        with self._lock:
            done = [process for process in self._processes if process.given_up and process.ended]
            for process in done:
                self._processes.remove(process)
        for process in done:
            process.end_by(time.monotonic())
            process.gone.set()


@contextlib.contextmanager
def kept_fork_server() -> Iterator[None]:
    """Keep the fork server, if there may be one, for all clusters that are made meanwhile."""
    if not _can_fork():
        yield
        return
    server = fork_servers.acquire(())
    try:
        yield
    finally:
        fork_servers.release(server)


def _can_fork() -> bool:
    """Whether a process with torch in it may be forked here, and its children be watched by others."""
    handle = open_pidfd(os.getpid()) if sys.platform == "linux" else None
    if handle is None:
        return False
    os.close(handle)
    return True

"""Workers forked by a process that has imported torch and transformers once, for all clusters of this process.

Knows the conversation with that process; not when workers start or what is done about their ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable

from lingualinked.processes.booting import Booting
from lingualinked.processes.fork_server import ForkChannel, fork_servers
from lingualinked.processes.server_process import ErrorFile, how_it_ended, wait_for_end
from lingualinked.processes.worker_starter import WorkerProcess
from lingualinked.protocol.boot import GRACE_S, WorkerForked


class ForkedWorkers:
    """Has every worker forked by the fork server for this environment, which tells of their ends while it lives."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self._class_names = class_names
        self._server_had_ended = False  # before the last wait: all that it has said can be read
        with contextlib.ExitStack() as undo:
            self.server = fork_servers.acquire(class_names)
            undo.callback(fork_servers.release, self.server)
            self.socket_folder = self.server.make_folder()
            undo.callback(shutil.rmtree, self.socket_folder, ignore_errors=True)
            self.errors = undo.enter_context(contextlib.closing(ErrorFile(self.socket_folder)))
            self._channel = ForkChannel(self.server, self.errors)
            undo.pop_all()

    def start(self, name: str, register: Callable[[ForkedWorker], None]) -> None:
        """Start one worker."""
        ours, theirs = socket.socketpair()
        register(ForkedWorker(Booting(ours), name))
        self._channel.fork(name, self._class_names, theirs)

    def descriptors(self, living: Iterable[ForkedWorker]) -> list[int | None]:
        """Return what becomes readable when something can be known of an end."""
        self._server_had_ended = self.server.process.ended
        told_by = [worker.handle for worker in living] if self._server_had_ended else [self.server.process.handle]
        return told_by if self._channel.hung_up else [self._channel.fileno(), *told_by]

    def read(self, ready: set[int], workers: Iterable[ForkedWorker]) -> None:
        """Note what the fork server says."""
        if self._channel.fileno() not in ready:
            return
        for line, handle in self._channel.read():
            if isinstance(line, WorkerForked):  # in the order in which they were asked for
                forked = next(worker for worker in workers if worker.name == line.name and worker.pid is None)
                forked.pid, forked.handle = line.pid, handle
                if forked.given_up:
                    forked.kill()
            else:
                for worker in workers:
                    if worker.pid == line.pid:
                        worker.exit_code = line.exit_code
        self._server_had_ended = False  # for now: it may have said more

    def how_ended(self, worker: ForkedWorker, ready: set[int]) -> str | None:
        """Say how a worker has ended, if it has."""
        if worker.exit_code is not None:
            return how_it_ended(worker.exit_code)
        if not self._server_had_ended:
            return None
        if worker.handle is not None:
            return how_it_ended(None) if worker.handle in ready else None
        tail = self.server.errors.tail()
        last_words = f"; its last words:\n{tail}" if tail else ""
        how = how_it_ended(self.server.process.exit_code)
        return f"it was not started: the process that forks this cluster's workers had ended, {how}{last_words}"

    def hang_up(self, workers: Iterable[ForkedWorker]) -> None:  # noqa: ARG002 - their channel is one for all
        """Let the workers see that the caller is done with them."""
        self._channel.hang_up()

    def close_by(self, deadline: float) -> None:
        """Let go of what the workers shared."""
        self._channel.close_by(deadline)
        fork_servers.release(self.server)
        self.errors.close()
        shutil.rmtree(self.socket_folder, ignore_errors=True)

    def detach_after_fork(self) -> None:
        """Close its descriptors in a forked child of the caller."""
        self._channel.detach_after_fork()
        self.errors.close()


class ForkedWorker(WorkerProcess):
    """One of them; its process is known once the fork server says so, as is its end, with the exit code."""

    exit_code: int | None = None

    def kill(self) -> None:
        """Force its end, if it has begun."""
        if self.handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def end_by(self, deadline: float) -> None:
        """Wait for its end until ``deadline``, then force it."""
        self.booting.close()
        if self.handle is not None and not wait_for_end(self.handle, deadline):
            self.kill()
            wait_for_end(self.handle, time.monotonic() + GRACE_S)
        self.detach_after_fork()

    def detach_after_fork(self) -> None:
        """Close its descriptors in a forked child of the caller."""
        self.booting.close()
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

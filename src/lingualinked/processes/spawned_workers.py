"""Workers started one by one as processes of their own, where forking is unsafe.

Knows `subprocess` by way of `ServerProcess`; not when workers start or what is done about their ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable

from lingualinked.processes.booting import Booting
from lingualinked.processes.server_process import ErrorFile, ServerProcess, how_it_ended
from lingualinked.processes.worker_starter import WorkerProcess
from lingualinked.protocol.boot import Preload
from lingualinked.transport.sockets.socket_folder import make_socket_folder


class SpawnedWorkers:
    """Starts every worker plainly: each imports torch and transformers for itself."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self._class_names = class_names
        with contextlib.ExitStack() as undo:
            self.socket_folder = make_socket_folder()
            undo.callback(shutil.rmtree, self.socket_folder, ignore_errors=True)
            self.errors = ErrorFile(self.socket_folder)
            undo.pop_all()

    def start(self, name: str, register: Callable[[SpawnedWorker], None]) -> None:
        """Start one worker."""
        preload = Preload(
            caller_pid=os.getpid(), forks=False, socket_folder=self.socket_folder, class_names=self._class_names
        )
        register(SpawnedWorker(name, ServerProcess(preload, self.errors)))

    def descriptors(self, living: Iterable[SpawnedWorker]) -> list[int | None]:
        """Return what becomes readable when something can be known of an end."""
        return [worker.handle for worker in living]

    def read(self, ready: set[int], workers: Iterable[SpawnedWorker]) -> None:
        """Nobody says anything of a spawned worker."""

    def how_ended(self, worker: SpawnedWorker, ready: set[int]) -> str | None:  # noqa: ARG002 - the system knows
        """Say how a worker has ended, if it has."""
        return how_it_ended(worker.process.exit_code) if worker.process.ended else None

    def hang_up(self, workers: Iterable[SpawnedWorker]) -> None:
        """Let the workers see that the caller is done with them."""
        for worker in workers:
            worker.process.hang_up()

    def close_by(self, deadline: float) -> None:  # noqa: ARG002 - nothing is shared that could end
        """Let go of what the workers shared."""
        self.errors.close()
        shutil.rmtree(self.socket_folder, ignore_errors=True)

    def detach_after_fork(self) -> None:
        """Close its descriptors in a forked child of the caller."""
        self.errors.close()


class SpawnedWorker(WorkerProcess):
    """One of them."""

    def __init__(self, name: str, process: ServerProcess) -> None:
        super().__init__(Booting(process.channel.dup()), name, process.pid, process.handle)
        self.process = process

    def kill(self) -> None:
        """Force its end, if it has begun."""
        self.process.kill()

    def end_by(self, deadline: float) -> None:
        """Wait for its end until ``deadline``, then force it."""
        self.booting.close()
        self.process.end_by(deadline)
        self.handle = None

    def detach_after_fork(self) -> None:
        """Close its descriptors in a forked child of the caller."""
        self.booting.close()
        self.process.detach_after_fork()
        self.handle = None

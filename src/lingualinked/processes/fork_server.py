"""The fork servers of this process: one for each environment that workers may need, shared by its clusters.

Knows who uses which, and a cluster's conversation with one; not what the workers do.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import socket
import threading
import time
from pathlib import Path

import msgspec

from lingualinked.processes.server_process import ErrorFile, ServerProcess, import_path, worker_environment
from lingualinked.protocol.boot import GRACE_S, ForkWorker, Preload, WorkerEnded, WorkerForked
from lingualinked.transport.sockets.socket_folder import make_socket_folder

_MOST_HANDLES = 64
# Libraries set these as they go, torch when it is imported and pytest for each test: workers read neither.
_SET_ON_THE_WAY = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
_Key = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]


class ForkServer:
    """A process that has imported torch and forks workers, with the number of its users."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.num_users = 0
        self._folders = itertools.count()
        self.has_forked = False
        with contextlib.ExitStack() as undo:
            self.socket_folder = folder = make_socket_folder()
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            self.errors = undo.enter_context(contextlib.closing(ErrorFile(folder)))
            preload = Preload(caller_pid=os.getpid(), forks=True, socket_folder=folder, class_names=class_names)
            self.process = ServerProcess(preload, self.errors)
            undo.pop_all()

    def make_folder(self) -> str:
        """Make a folder for the sockets of one cluster."""
        folder = Path(self.socket_folder) / str(next(self._folders))
        folder.mkdir(mode=0o700)
        return str(folder)

    def end(self) -> None:
        """End the process and remove the folder of sockets; returns once both are gone."""
        self.process.hang_up()
        if not self.has_forked:
            self.process.kill()  # it may be importing
        self.process.end_by(time.monotonic() + GRACE_S)
        self.errors.close()
        shutil.rmtree(self.socket_folder, ignore_errors=True)

    def detach_after_fork(self) -> None:
        """Close this process's descriptors of it in a forked child of the caller."""
        self.process.detach_after_fork()
        self.errors.close()


class _Servers:
    """All fork servers of this process that are in use."""

    def __init__(self) -> None:
        # Reentrant: a finalizer gives a server back, and the garbage collector may run one in here.
        self._lock = threading.RLock()
        self._by_key: dict[_Key, ForkServer] = {}

    def acquire(self, class_names: tuple[str, ...]) -> ForkServer:
        """Return the server for workers as this process would start them now; a new one if there is none that lives."""
        wishes = sorted(each for each in worker_environment().items() if each[0] not in _SET_ON_THE_WAY)
        key = (tuple(import_path()), tuple(wishes))
        with self._lock:
            server = self._by_key.get(key)
            if server is not None:
                server.num_users += 1
                if not server.process.ended:
                    return server
                server.num_users -= 1
            server = ForkServer(class_names)
            server.num_users += 1
            self._by_key[key] = server
            return server

    def release(self, server: ForkServer) -> None:
        """Release a server; its last user ends it."""
        with self._lock:
            server.num_users -= 1
            if server.num_users:
                return
            for key in [key for key, each in self._by_key.items() if each is server]:
                del self._by_key[key]
        server.end()

    def detach_after_fork(self) -> None:
        """Close the descriptors of all servers in a forked child of this process."""
        self._lock = threading.RLock()  # whoever held it is not in this process
        while self._by_key:
            self._by_key.popitem()[1].detach_after_fork()


fork_servers = _Servers()


class ForkChannel:
    """One cluster's conversation with a fork server, and the lifeline of its workers."""

    def __init__(self, server: ForkServer, errors: ErrorFile) -> None:
        self._server = server
        self.hung_up = False
        self._text = b""
        self._handles: list[int] = []
        self._socket, theirs = socket.socketpair()
        with theirs:
            server.process.connect(theirs.fileno(), errors.fileno())

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to `read`."""
        return self._socket.fileno()

    def fork(self, name: str, class_names: tuple[str, ...], boot: socket.socket) -> None:
        """Ask for a worker, and hand it the socket on which it will ask for its `Boot`."""
        with boot, contextlib.suppress(OSError):  # a server that is gone is seen by who watches it
            request = msgspec.json.encode(ForkWorker(name=name, class_names=class_names)) + b"\n"
            socket.send_fds(self._socket, [request], [boot.fileno()])

    def read(self) -> list[tuple[WorkerForked | WorkerEnded, int | None]]:
        """Read what the server says, with the descriptor that travels beside a `WorkerForked`; there must be something."""
        try:
            data, handles, _, _ = socket.recv_fds(self._socket, 65536, _MOST_HANDLES)
        except OSError:
            data, handles = b"", []
        for handle in handles:
            os.set_inheritable(handle, False)  # else whatever the caller executes would hold it too
        self.hung_up = not data
        self._handles += handles
        *lines, self._text = (self._text + data).split(b"\n")
        said = [msgspec.json.decode(line, type=WorkerForked | WorkerEnded) for line in lines]
        self._server.has_forked |= bool(said)
        return [(line, self._handles.pop(0) if isinstance(line, WorkerForked) else None) for line in said]

    def hang_up(self) -> None:
        """Let the workers see that the caller is done with them."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)  # half of it: the other half shows when all of them are gone

    def close_by(self, deadline: float) -> None:
        """Wait until the server and all workers have closed their end, no longer than ``deadline``; close this one."""
        poller = select.poll()
        poller.register(self._socket, 0)
        if self._server.has_forked:
            poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        self.detach_after_fork()

    def detach_after_fork(self) -> None:
        """Close what this process holds."""
        self._socket.close()
        while self._handles:  # of workers whose line had not come whole
            os.close(self._handles.pop())

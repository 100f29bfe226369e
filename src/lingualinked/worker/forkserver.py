"""Imports torch and transformers once, then forks workers that compute at once, for every cluster of one caller.

Knows nothing of stages, and no worker's keys; while it forks it has no thread and no accelerator of its own, so that
forking it is safe.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from typing import NoReturn

import msgspec

from lingualinked.protocol.boot import GRACE_S, Boot, ForkWorker, Preload, WorkerEnded, WorkerForked, WorkerKey
from lingualinked.worker.inheritance import shed_inheritance
from lingualinked.worker.lifeline import Lifeline, end_process

_MOST_HANDLES = 64


def main() -> None:
    """Serve the caller at the other end of standard input until it is gone."""
    faulthandler.enable()
    shed_inheritance()
    channel = _take_standard_input()
    first = _read_line(channel)
    if first is None:
        return
    preload = msgspec.json.decode(first, type=Preload)
    with _lifeline(channel, preload):
        import torch

        torch.set_num_threads(1)  # no thread pool may exist when this process forks
        import lingualinked.worker.server  # noqa: F401 - what every worker stands on

        _import_classes(preload.class_names)
    if preload.forks:
        _ForkServer(channel, preload).run()
    else:
        _become_worker(channel, channel)


def _lifeline(channel: socket.socket, preload: Preload) -> contextlib.closing[Lifeline]:
    """Watch the caller while something is imported, which takes seconds; the thread that does it ends before any fork."""
    return contextlib.closing(Lifeline(channel.fileno(), preload.caller_pid, preload.socket_folder))


def _become_worker(boot_channel: socket.socket, channel: socket.socket) -> None:
    from lingualinked.transport.keys import generate_keypair
    from lingualinked.worker.server import serve

    keys = generate_keypair()
    with contextlib.suppress(OSError):  # the caller is gone, as reading says
        boot_channel.sendall(msgspec.json.encode(WorkerKey(public_key=keys.public)) + b"\n")
    line = _read_line(boot_channel)
    if line is not None:
        serve(msgspec.json.decode(line, type=Boot), keys, channel.fileno())


def _take_standard_input() -> socket.socket:
    """Move the caller's socket away from descriptor 0, where anything that reads standard input would eat from it."""
    channel = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return channel


def _read_line(channel: socket.socket) -> bytes | None:
    """Read one line and nothing behind it; ``None`` if the other end closes first."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            data = channel.recv(65536, socket.MSG_PEEK)
        except ConnectionResetError:  # closed with something of ours unread
            data = b""
        if not data:
            return None
        line += channel.recv(data.find(b"\n") + 1 or len(data))
    return line


def _import_classes(names: tuple[str, ...]) -> None:
    """Import the modelling code of transformers classes."""
    transformers = importlib.import_module("transformers")
    for name in names:
        with contextlib.suppress(AttributeError, ImportError):  # loading the stage will say what is wrong
            getattr(transformers, name)
    gc.collect()
    gc.freeze()  # what is imported stays: collecting it again would cost steps time, and copy shared pages


class _Cluster:
    """The fork server's end of its conversation with one cluster.

    Parameters
    ----------
    channel : int
        Descriptor of the socket to the cluster; its workers inherit it, as their lifeline.
    errors : int
        Descriptor of the file for its workers' standard output and error.
    """

    def __init__(self, channel: int, errors: int) -> None:
        self.channel = socket.socket(fileno=channel)
        self.errors = errors
        self.requests: collections.deque[tuple[ForkWorker, socket.socket]] = collections.deque()
        self.children: set[int] = set()
        self._text = b""
        self._boots: list[socket.socket] = []

    @property
    def hung_up(self) -> bool:
        """Whether the caller has: whatever the cluster has still asked for is not wanted any more."""
        poller = select.poll()
        poller.register(self.channel, select.POLLRDHUP)
        return bool(poller.poll(0))

    def read(self) -> None:
        """Read its requests, each with the socket beside it; its channel must be readable."""
        data, handles = _receive(self.channel)
        self._boots += [socket.socket(fileno=handle) for handle in handles]
        *lines, self._text = (self._text + data).split(b"\n")
        self.requests += [(msgspec.json.decode(line, type=ForkWorker), self._boots.pop(0)) for line in lines]

    def tell(self, line: WorkerForked | WorkerEnded, *handles: int) -> None:
        """Say something to the cluster, with descriptors beside it."""
        with contextlib.suppress(OSError):  # the caller is gone, as the next poll will say
            socket.send_fds(self.channel, [msgspec.json.encode(line) + b"\n"], handles)

    def close(self) -> None:
        """Close what this process holds of it."""
        os.close(self.errors)
        for each in (self.channel, *self._boots, *(boot for _, boot in self.requests)):
            each.close()


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Receive bytes, none once the other end is closed, and the descriptors beside them."""
    try:
        data, handles, _, _ = socket.recv_fds(channel, 65536, _MOST_HANDLES)
    except ConnectionResetError:  # closed with something of ours unread
        return b"", []
    return data, handles


class _ForkServer:
    def __init__(self, channel: socket.socket, preload: Preload) -> None:
        self._channel = channel
        self._preload = preload
        self._imported = set(preload.class_names)
        self._clusters: list[_Cluster] = []
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._caller = -1

    def run(self) -> NoReturn:
        """Fork workers as clusters ask for them, and tell of their ends, until the caller is gone."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with contextlib.suppress(ProcessLookupError):
            # Its end is a sign of its own: a child that it forked may hold the other end of the channel.
            self._caller = os.pidfd_open(self._preload.caller_pid)
            self._serve()
        self._wait_for_children()
        end_process(self._preload.socket_folder)

    def _serve(self) -> None:
        while True:
            poller = select.poll()
            for descriptor in (self._channel.fileno(), self._woken.fileno(), self._caller):
                poller.register(descriptor, select.POLLIN)
            for cluster in list(self._clusters):
                if not cluster.hung_up:
                    poller.register(cluster.channel, select.POLLIN)
                elif not cluster.children:
                    self._clusters.remove(cluster)
                    cluster.close()
            ready = {descriptor for descriptor, _ in poller.poll()}
            self._reap()
            if self._caller in ready or (self._channel.fileno() in ready and not self._welcome()):
                return
            for cluster in self._clusters:
                if cluster.channel.fileno() in ready:
                    self._serve_cluster(cluster)

    def _welcome(self) -> bool:
        """Take on clusters whose channel and errors the caller sends; ``False`` once it has hung up."""
        data, handles = _receive(self._channel)
        self._clusters += [_Cluster(*pair) for pair in zip(handles[::2], handles[1::2], strict=True)]
        return bool(data)

    def _serve_cluster(self, cluster: _Cluster) -> None:
        cluster.read()
        while cluster.requests and not cluster.hung_up:
            request, boot = cluster.requests.popleft()
            with boot:
                if missing := set(request.class_names) - self._imported:
                    self._imported |= missing
                    with _lifeline(self._channel, self._preload):
                        _import_classes(tuple(sorted(missing)))
                self._fork(request.name, boot, cluster)

    def _fork(self, name: str, boot: socket.socket, cluster: _Cluster) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._leave(cluster)
                _become_worker(boot, cluster.channel)
                status = 0
            except BaseException:  # noqa: BLE001 - this process ends here, whatever it was
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        cluster.children.add(pid)
        handle = os.pidfd_open(pid)
        cluster.tell(WorkerForked(name=name, pid=pid), handle)
        os.close(handle)

    def _leave(self, cluster: _Cluster) -> None:
        """Keep nothing in a forked worker but the socket to its cluster, which is its lifeline."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for channel in (self._channel, self._woken, self._wake):
            channel.close()
        os.close(self._caller)
        for stream in (1, 2):
            os.dup2(cluster.errors, stream)
        lifeline = os.dup(cluster.channel.fileno())
        for each in self._clusters:
            each.close()
        cluster.channel = socket.socket(fileno=lifeline)

    def _reap(self) -> None:
        """Tell clusters which of their workers have ended, and how."""
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while self._children():
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            for cluster in self._clusters:
                if pid in cluster.children:
                    cluster.children.discard(pid)
                    cluster.tell(WorkerEnded(pid=pid, status=status))

    def _wait_for_children(self) -> None:
        """Wait for the workers, which see by themselves that the caller is gone; force those that are stopped."""
        deadline = time.monotonic() + GRACE_S
        while (pids := self._children()) and (left_s := deadline - time.monotonic()) > 0:
            select.select([self._woken], [], [], left_s)
            self._reap()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _children(self) -> list[int]:
        return [pid for cluster in self._clusters for pid in cluster.children]

"""Imports torch and transformers once, then forks workers that can compute at once, for all clusters of one caller.

Knows no stages and no worker's keys. While it forks, this process has no thread and no accelerator, so that forking is safe.
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

from lingualinked.errors import LingualinkedError
from lingualinked.protocol.boot import GRACE_S, Boot, ForkWorker, Preload, WorkerEnded, WorkerForked, WorkerKey
from lingualinked.worker.process.inheritance import shed_inheritance
from lingualinked.worker.process.lifeline import Lifeline, end_process

_MAX_HANDLES = 64


def main() -> None:
    """Serve the caller at the other end of standard input until it has ended."""
    faulthandler.enable()
    shed_inheritance()
    channel = _take_standard_input()
    first = _read_line(channel)
    if first is None:
        return
    preload = msgspec.json.decode(first, type=Preload)
    # Should an import ask whether there is a GPU: the driver's own answer would initialise it, which no fork survives.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    gc.disable()  # what is imported stays: going through it again and again would take a sixth of the time
    with _watch_caller(channel, preload):
        import torch

        torch.set_num_threads(1)  # no thread pool may exist when this process forks
        import lingualinked.worker.server  # noqa: F401 - what every worker stands on

        _import_classes(preload.class_names)
    gc.enable()
    if preload.forks:
        _WorkerForker(channel, preload).run()
    else:
        _become_worker(channel, channel)


def _watch_caller(channel: socket.socket, preload: Preload) -> contextlib.closing[Lifeline]:
    """Watch the caller during imports, which take seconds, in a thread that ends before any fork."""
    return contextlib.closing(Lifeline(channel.fileno(), preload.caller_pid, preload.socket_folder))


def _become_worker(boot_channel: socket.socket, channel: socket.socket) -> None:
    from lingualinked.transport.keys.keys import generate_keypair  # imports zmq
    from lingualinked.worker.server import serve  # imports torch

    keys = generate_keypair()
    with contextlib.suppress(OSError):  # the caller has ended; the read below notices it
        boot_channel.sendall(msgspec.json.encode(WorkerKey(public_key=keys.public)) + b"\n")
    line = _read_line(boot_channel)
    if line is not None:
        serve(msgspec.json.decode(line, type=Boot), keys, channel.fileno())


def _take_standard_input() -> socket.socket:
    """Move the caller's socket away from descriptor 0, where code that reads standard input would consume its bytes."""
    channel = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return channel


def _read_line(channel: socket.socket) -> bytes | None:
    """Read one line and nothing after it; return None if the other end closes first."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            data = channel.recv(65536, socket.MSG_PEEK)
        except ConnectionResetError:  # closed before it read everything
            data = b""
        if not data:
            return None
        line += channel.recv(data.find(b"\n") + 1 or len(data))
    return line


def _import_classes(names: tuple[str, ...]) -> None:
    """Import the modelling code of transformers classes."""
    transformers = importlib.import_module("transformers")
    for name in names:
        with contextlib.suppress(Exception):  # loading the stage will raise; other workers are not to end for it
            getattr(transformers, name)
    gc.freeze()  # imported modules stay: collecting them again would slow steps down, and copy shared pages


class _ClusterChannel:
    """The fork server's connection to one cluster.

    The cluster's workers inherit the socket `channel` as their lifeline, and write output and errors to the file `errors`.
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
        """Whether the caller has closed its end: the cluster's remaining requests are obsolete."""
        poller = select.poll()
        poller.register(self.channel, select.POLLRDHUP)
        return bool(poller.poll(0))

    def read_requests(self) -> None:
        """Read the cluster's requests, each with its socket; the channel must be readable."""
        data, handles = _receive_with_handles(self.channel)
        self._boots += [socket.socket(fileno=handle) for handle in handles]
        *lines, self._text = (self._text + data).split(b"\n")
        self.requests += [(msgspec.json.decode(line, type=ForkWorker), self._boots.pop(0)) for line in lines]

    def send_message(self, message: WorkerForked | WorkerEnded, *handles: int) -> None:
        """Send a message to the cluster, with descriptors."""
        with contextlib.suppress(OSError):  # the caller has ended; the next poll notices it
            socket.send_fds(self.channel, [msgspec.json.encode(message) + b"\n"], handles)

    def close(self) -> None:
        """Close all descriptors of the cluster in this process."""
        os.close(self.errors)
        for each in (self.channel, *self._boots, *(boot for _, boot in self.requests)):
            each.close()


def _receive_with_handles(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Receive bytes (none once the other end is closed), and the descriptors sent with them."""
    try:
        data, handles, _, _ = socket.recv_fds(channel, 65536, _MAX_HANDLES)
    except ConnectionResetError:  # closed before it read everything
        return b"", []
    return data, handles


class _WorkerForker:
    def __init__(self, channel: socket.socket, preload: Preload) -> None:
        self._channel = channel
        self._preload = preload
        self._imported = set(preload.class_names)
        self._clusters: list[_ClusterChannel] = []
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._caller = -1

    def run(self) -> NoReturn:
        """Fork workers on request and report their ends, until the caller has ended."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with contextlib.suppress(ProcessLookupError):
            # Watched too, since a child that the caller forked may keep the other end of the channel open.
            self._caller = os.pidfd_open(self._preload.caller_pid)
            self._serve()
        self._wait_for_children()
        end_process(self._preload.socket_folder)

    def _serve(self) -> None:
        while True:
            # 1) wait for the caller, a cluster's request, or the end of a child; close clusters that have no children left
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
            # 2) report ended workers; stop if the caller has ended; accept new clusters
            self._reap_children()
            if self._caller in ready or (self._channel.fileno() in ready and not self._accept_clusters()):
                return
            # 3) fork the workers that clusters have requested
            for cluster in self._clusters:
                if cluster.channel.fileno() in ready:
                    self._serve_cluster(cluster)

    def _accept_clusters(self) -> bool:
        """Accept clusters, whose channel and error file the caller sends; return False once it has hung up."""
        data, handles = _receive_with_handles(self._channel)
        self._clusters += [_ClusterChannel(*pair) for pair in zip(handles[::2], handles[1::2], strict=True)]
        return bool(data)

    def _serve_cluster(self, cluster: _ClusterChannel) -> None:
        cluster.read_requests()
        while cluster.requests and not cluster.hung_up:
            request, boot = cluster.requests.popleft()
            with boot:
                if missing := set(request.class_names) - self._imported:
                    self._imported |= missing
                    with _watch_caller(self._channel, self._preload):
                        _import_classes(tuple(sorted(missing)))
                self._fork_worker(request.name, boot, cluster)

    def _fork_worker(self, name: str, boot: socket.socket, cluster: _ClusterChannel) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._detach_after_fork(cluster)
                _become_worker(boot, cluster.channel)
                status = 0
            except LingualinkedError as error:  # raised on purpose: it says all
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            except BaseException:  # noqa: BLE001 - this process must end here in any case
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        cluster.children.add(pid)
        handle = os.pidfd_open(pid)
        cluster.send_message(WorkerForked(name=name, pid=pid), handle)
        os.close(handle)

    def _detach_after_fork(self, cluster: _ClusterChannel) -> None:
        """Close everything in a forked worker except the socket to its cluster, which is its lifeline."""
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

    def _reap_children(self) -> None:
        """Report ended workers, with their exit status, to their clusters."""
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while self._child_pids():
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            for cluster in self._clusters:
                if pid in cluster.children:
                    cluster.children.discard(pid)
                    cluster.send_message(WorkerEnded(pid=pid, exit_code=os.waitstatus_to_exitcode(status)))

    def _wait_for_children(self) -> None:
        """Wait for the workers, which notice by themselves that the caller has ended; kill those that do not end."""
        deadline = time.monotonic() + GRACE_S
        while (pids := self._child_pids()) and (left_s := deadline - time.monotonic()) > 0:
            select.select([self._woken], [], [], left_s)
            self._reap_children()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _child_pids(self) -> list[int]:
        return [pid for cluster in self._clusters for pid in cluster.children]

"""Imports torch and transformers once, then forks workers that compute at once.

Knows nothing of stages; it has no thread and no accelerator of its own, so that forking it is safe.
"""

from __future__ import annotations

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

from lingualinked.protocol.boot import GRACE_S, Boot, Ended, Forked, Preload


def main() -> None:
    """Serve fork requests from standard input until it closes."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = _take_standard_input()
    lines = _Lines(channel)
    first = lines.read()
    if first is None:
        return
    preload = msgspec.json.decode(first, type=Preload)
    _import_once(preload.class_names)
    if preload.forks:
        _ForkServer(channel, lines, preload.caller_pid).run()
    elif (line := lines.read()) is not None:
        _become(msgspec.json.decode(line, type=Boot), channel)


def _become(boot: Boot, channel: socket.socket) -> None:
    from lingualinked.worker.server import serve

    serve(boot, channel.fileno())


def _take_standard_input() -> socket.socket:
    """Move the caller's socket away from descriptor 0, where anything that reads standard input would eat from it."""
    channel = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return channel


def _import_once(class_names: tuple[str, ...]) -> None:
    """Import what every worker needs, and the modelling code of the named classes."""
    import torch

    torch.set_num_threads(1)  # no thread pool may exist when this process forks
    importlib.import_module("lingualinked.worker.server")
    transformers = importlib.import_module("transformers")
    for name in class_names:
        with contextlib.suppress(AttributeError, ImportError):  # loading the stage will say what is wrong
            getattr(transformers, name)
    gc.collect()
    gc.freeze()  # what is imported stays: collecting it again would cost steps time, and copy shared pages


class _Lines:
    """Text lines of a stream socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._pending = b""

    def fill(self) -> bool:
        """Take in what has arrived; ``False`` once the other end is closed."""
        try:
            data = self._channel.recv(65536)
        except ConnectionResetError:  # closed with something of ours unread
            data = b""
        self._pending += data
        return bool(data)

    def read(self) -> bytes | None:
        """Return the next line, or ``None`` once the other end is closed."""
        while not self.has_line:
            if not self.fill():
                return None
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    @property
    def has_line(self) -> bool:
        """Whether a whole line has already arrived."""
        return b"\n" in self._pending


class _ForkServer:
    def __init__(self, channel: socket.socket, lines: _Lines, caller_pid: int) -> None:
        self._channel = channel
        self._lines = lines
        self._caller_pid = caller_pid
        self._children: set[int] = set()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)

    def run(self) -> NoReturn:
        """Fork a worker per boot record, and tell of its end, until the caller is gone."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with contextlib.suppress(ProcessLookupError):
            # Its end is a sign of its own: a child that it forked may hold the other end of the channel.
            caller = os.pidfd_open(self._caller_pid)
            self._serve(caller)
        self._see_off()
        os._exit(0)  # an interpreter that has torch in it takes longer to end than its workers do

    def _serve(self, caller: int) -> None:
        poller = select.poll()
        for descriptor in (self._channel.fileno(), self._woken.fileno(), caller):
            poller.register(descriptor, select.POLLIN)
        while True:
            while self._lines.has_line:
                self._fork(msgspec.json.decode(self._lines.read() or b"", type=Boot), caller)
            ready = {descriptor for descriptor, _ in poller.poll()}
            self._reap()
            if caller in ready or (self._channel.fileno() in ready and not self._lines.fill()):
                return

    def _fork(self, boot: Boot, caller: int) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                self._woken.close()
                self._wake.close()
                os.close(caller)
                _become(boot, self._channel)
                status = 0
            except BaseException:  # noqa: BLE001 - this process ends here, whatever it was
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        self._children.add(pid)
        handle = os.pidfd_open(pid)
        try:
            line = msgspec.json.encode(Forked(name=boot.name, pid=pid)) + b"\n"
            with contextlib.suppress(OSError):  # the caller is gone, as the next poll will say
                socket.send_fds(self._channel, [line], [handle])
        finally:
            os.close(handle)

    def _reap(self) -> None:
        """Tell the caller which workers have ended, and how."""
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            with contextlib.suppress(OSError):
                self._channel.sendall(msgspec.json.encode(Ended(pid=pid, status=status)) + b"\n")

    def _see_off(self) -> None:
        """Wait for the workers, which see by themselves that the caller is gone; force those that are stopped."""
        deadline = time.monotonic() + GRACE_S
        while self._children and (left_s := deadline - time.monotonic()) > 0:
            select.select([self._woken], [], [], left_s)
            self._reap()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

"""Imports torch and transformers once, then forks workers that compute at once.

Knows nothing of stages; it has no thread and no accelerator of its own, so that forking it is safe.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import select
import signal
import socket
import sys

import msgspec

from lingualinked.protocol.boot import Boot, Ended, Forked, Preload


def main() -> None:
    """Serve fork requests from standard input until it closes."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=os.dup(0))
    lines = _Lines(channel)
    first = lines.read()
    if first is None:
        return
    preload = msgspec.json.decode(first, type=Preload)
    _import_once(preload.class_names)
    _ForkServer(channel, lines).run()


def _import_once(class_names: tuple[str, ...]) -> None:
    """Import what every worker needs, and the modelling code of the named classes."""
    import torch

    torch.set_num_threads(1)  # no thread pool may exist when this process forks
    importlib.import_module("lingualinked.worker.server")
    transformers = importlib.import_module("transformers")
    for name in class_names:
        with contextlib.suppress(AttributeError, ImportError):  # loading the stage will say what is wrong
            getattr(transformers, name)


class _Lines:
    """Text lines of a stream socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._pending = b""

    def fill(self) -> bool:
        """Take in what has arrived; ``False`` once the other end is closed."""
        data = self._channel.recv(65536)
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
    def __init__(self, channel: socket.socket, lines: _Lines) -> None:
        self._channel = channel
        self._lines = lines
        self._children: set[int] = set()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        while True:
            while self._lines.has_line:
                boot = msgspec.json.decode(self._lines.read() or b"", type=Boot)
                if not boot.forks:
                    self._become(boot)
                    return
                self._fork(boot)
            ready = {descriptor for descriptor, _ in poller.poll()}
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
                self._reap()
            if self._channel.fileno() in ready and not self._lines.fill():
                return  # the caller is gone; workers watch the same socket and end by themselves

    def _fork(self, boot: Boot) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._become(boot)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        self._children.add(pid)
        handle = os.pidfd_open(pid)
        try:
            line = msgspec.json.encode(Forked(name=boot.name, pid=pid)) + b"\n"
            socket.send_fds(self._channel, [line], [handle])
        finally:
            os.close(handle)

    def _become(self, boot: Boot) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._woken.close()
        self._wake.close()
        from lingualinked.worker.server import serve

        serve(boot, self._channel.fileno())

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            with contextlib.suppress(OSError):
                self._channel.sendall(msgspec.json.encode(Ended(pid=pid, status=status)) + b"\n")

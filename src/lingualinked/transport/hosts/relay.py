"""Forwards the bytes of connections to one fixed address, for two parties that can't reach each other.

Knows TCP alone: what it forwards is encrypted from end to end, and it has no key.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from collections.abc import Callable

from lingualinked.address import Address
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint, TcpListener
from lingualinked.transport.sockets.waker import Waker

logger = logging.getLogger("lingualinked.transport")

MOST_CONNECTIONS = 4
"""Connections at once through one relay: a party needs one, and another while the one before ends."""

_BUFFER_BYTES = 256 << 10
_CONNECT_S = 3.0
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))  # where the system has them


class Relay:
    """Listens at an endpoint, and connects each that comes to the target, until it is closed; on threads of its own.

    Raises ArgumentError and ResourceError as `TcpListener` does.
    """

    def __init__(self, endpoint: TcpEndpoint, target: Address) -> None:
        self._target = target
        self._listener = TcpListener(endpoint)
        self.address = self._listener.address  # where others reach it; its host may be a wildcard
        self._waker = Waker()
        self._lock = threading.Lock()
        self._pipes: set[_Pipe] = set()
        self._thread = threading.Thread(target=self._accept_connections, name="lingualinked-relay", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._listener.close()
            self._waker.close()
            raise

    def close(self) -> None:
        """End all connections, and listen no more."""
        self._waker.set()
        self._thread.join()
        with self._lock:
            pipes = list(self._pipes)
        for pipe in pipes:
            pipe.end()
        for pipe in pipes:
            pipe.join()

    def _accept_connections(self) -> None:
        poll = select.poll()
        for descriptor in (self._listener.fileno(), self._waker.fileno()):
            poll.register(descriptor, select.POLLIN)
        try:
            while not self._waker.clear():
                poll.poll()
                source = self._listener.accept()
                if source is not None:
                    self._open_pipe(source)
        finally:
            self._listener.close()
            self._waker.close()

    def _open_pipe(self, source: socket.socket) -> None:
        with self._lock:
            if len(self._pipes) >= MOST_CONNECTIONS:
                source.close()
                return
            try:
                pipe = _Pipe(source, self._target, self._forget)
                pipe.start()
            except (OSError, RuntimeError) as error:  # no descriptor, or no thread, is left
                logger.warning("a relay to %s can't take a connection: %s", self._target, error)
                source.close()
                return
            self._pipes.add(pipe)

    def _forget(self, pipe: _Pipe) -> None:
        with self._lock:
            self._pipes.discard(pipe)


class _Pipe(threading.Thread):
    """One connection and its other half: a thread for each direction, so that neither waits for the other."""

    def __init__(self, source: socket.socket, target: Address, on_end: Callable[[_Pipe], None]) -> None:
        super().__init__(name="lingualinked-relay", daemon=True)
        self._source = source
        self._address = target
        self._on_end = on_end
        self._lock = threading.Lock()
        self._has_ended = False
        self._target = socket.socket(socket.AF_INET6 if ":" in target.host else socket.AF_INET)

    def run(self) -> None:
        """Connect to the target, and forward until either side ends."""
        try:
            self._target.settimeout(_CONNECT_S)
            self._target.connect((self._address.host, self._address.port))
            for each in (self._source, self._target):
                each.settimeout(None)
                _prepare(each)
            back = threading.Thread(
                target=self._forward, args=(self._target, self._source), name="lingualinked-relay", daemon=True
            )
            back.start()
            self._forward(self._source, self._target)
            back.join()
        except OSError as error:
            logger.warning("a relay can't connect to %s: %s", self._address, error)
        finally:
            with self._lock:
                self._has_ended = True
                self._source.close()
                self._target.close()
            self._on_end(self)

    def end(self) -> None:
        """End both halves; from any thread."""
        with self._lock:
            if not self._has_ended:
                for each in (self._source, self._target):
                    with contextlib.suppress(OSError):  # not connected yet, or not any more
                        each.shutdown(socket.SHUT_RDWR)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        with contextlib.suppress(OSError):  # either side has ended
            while num_bytes := source.recv_into(buffer):
                target.sendall(buffer[:num_bytes])
        self.end()


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a side that is cut off must not stay for ever
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

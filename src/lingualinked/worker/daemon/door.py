"""The socket at which a daemon's callers come: authenticated, encrypted, and bounded in what it takes.

Knows public keys and bytes; not what is said.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import zmq

from lingualinked.address import Address
from lingualinked.protocol.daemon import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, MAX_FRAME_BYTES
from lingualinked.public_key import raw_key
from lingualinked.transport.keys.keys import KeyPair
from lingualinked.transport.sockets.handshakes import TIMEOUT_MS
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint, TcpListener
from lingualinked.transport.sockets.zap import DOMAIN, ZapHandler
from lingualinked.transport.wire.refusals import Refusals

logger = logging.getLogger("lingualinked.daemon")

_CLOSE_TIMEOUT_S = 5.0
_OPEN_PER_KEY = 64  # connections, on average: each is a caller with a worker of its own
_MAX_UNSENT = 1_000  # messages to one caller, of which it is sent two a second; more than one that reads ever has
_BURST, _PER_S = 1_000, 20.0  # messages of one client; an honest one sends a few for each worker
_MOST_HUNG_UP = 10_000
_MAX_AT_ONCE = 100  # messages read before the loop does something else


class Budget:
    """How many messages a client may still send: some at once, then so many a second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_left = float(_BURST)
        self._seen_s = clock()

    def spend(self) -> bool:
        """Count a message; return whether it may be sent."""
        now_s = self._clock()
        self._num_left = min(_BURST, self._num_left + (now_s - self._seen_s) * _PER_S)
        self._seen_s = now_s
        if self._num_left < 1:
            return False
        self._num_left -= 1
        return True


class Received(NamedTuple):
    """A message, and who sent it."""

    routing_id: bytes  # of the connection
    payload: bytes
    public_key: str
    host: str


class Door:
    """Listens at an address for holders of keys that are let in; raises as `TcpListener` does."""

    def __init__(self, bind: Address, keys: KeyPair, owner: str) -> None:
        self._let_in: set[str] = set()
        self._budgets: dict[str, Budget] = {}  # by key
        self._hung_up: set[bytes] = set()  # connections
        with contextlib.ExitStack() as undo:
            self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            self._zap = ZapHandler(self._context, Refusals(owner), _OPEN_PER_KEY)
            undo.callback(self._zap.stop, _CLOSE_TIMEOUT_S)
            self._router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
            undo.callback(self._router.close)
            self._set_up(keys)
            self._zap.watch_handshakes(self._router)
            ports = (bind.port, bind.port) if bind.port else None
            self._listener = TcpListener(TcpEndpoint(host=bind.host, ports=ports))
            undo.callback(self._listener.close)
            self._listener.bind_socket(self._router)
            self._zap.guard(self._listener.gate)
            self.address = Address(bind.host, self._listener.port)
            undo.pop_all()

    def _set_up(self, keys: KeyPair) -> None:
        router = self._router
        router.curve_server = True
        router.curve_publickey = keys.public.encode()
        router.curve_secretkey = keys.secret.encode()
        router.zap_domain = DOMAIN
        router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        router.linger = 0
        router.handshake_ivl = TIMEOUT_MS
        router.maxmsgsize = MAX_FRAME_BYTES
        # Unlimited: a connection that ends while libzmq has stopped reading it aborts the process at its next heartbeat
        # (libzmq issues 3937 and 4767). `receive` hangs up on who sends too much instead.
        router.rcvhwm = 0
        router.sndhwm = _MAX_UNSENT
        router.router_mandatory = 1
        router.heartbeat_ivl, router.heartbeat_timeout = HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS
        router.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS

    def admit(self, public_keys: Iterable[str] | Mapping[str, str]) -> None:
        """Let in the holders of these keys, and no others from now on."""
        wanted = set(public_keys)
        for key in self._let_in - wanted:
            del self._budgets[key]
            self._zap.withdraw(raw_key(key))
        for key in wanted - self._let_in:
            self._budgets[key] = Budget()
            self._zap.authorise(raw_key(key), key)
        self._let_in = wanted

    def wait(self, timeout_s: float, descriptors: Sequence[int]) -> set[int]:
        """Wait until something can be received, or read from a descriptor; return the descriptors."""
        items: list[tuple[zmq.Socket[bytes] | int, int]] = [(self._router, zmq.POLLIN)]
        items += [(descriptor, zmq.POLLIN) for descriptor in descriptors]
        return {each for each, _ in zmq.zmq_poll(items, int(timeout_s * 1000) + 1) if isinstance(each, int)}

    def receive(self) -> Iterator[Received]:
        """Receive the messages that have come, up to a limit; hang up on clients that send too many."""
        for _ in range(_MAX_AT_ONCE):
            try:
                routing_id, *frames = self._router.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            frame = frames[0]
            key = str(frame.get("User-Id"))
            if key not in self._let_in or not self._budgets[key].spend():
                self._hang_up(routing_id.bytes, frame)
            elif len(frames) == 1 and routing_id.bytes not in self._hung_up:
                yield Received(routing_id.bytes, frame.bytes, key, str(frame.get("Peer-Address")))

    def send(self, routing_id: bytes, payload: bytes) -> bool:
        """Send a message; return whether the connection is still there, and its other end reads what it is sent."""
        try:
            self._router.send_multipart([routing_id, payload], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def _hang_up(self, routing_id: bytes, frame: zmq.Frame) -> None:
        """End the connection that a frame came from, once: its descriptor may be that of another one later."""
        if routing_id in self._hung_up:
            return
        if len(self._hung_up) >= _MOST_HUNG_UP:
            self._hung_up.clear()
        self._hung_up.add(routing_id)
        logger.warning(
            "a client at %s sends too many messages, or is not authorised any more: its connection is ended",
            frame.get("Peer-Address"),
        )
        # libzmq can't end a single connection; it sees the end of this one, and closes its descriptor.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(frame.get(zmq.SRCFD)))) as connection:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, and with it all connections."""
        self._router.close()
        self._listener.close()
        if not self._zap.stop(_CLOSE_TIMEOUT_S):
            logger.warning("a ZeroMQ context did not end within %s s", _CLOSE_TIMEOUT_S)

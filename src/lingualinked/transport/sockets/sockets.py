"""The ZeroMQ sockets of one mailbox: the inbox with its endpoints, and an outbox for each peer.

Knows keys and addresses, checked by the mailbox; no messages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

import zmq

from lingualinked.public_key import raw_key
from lingualinked.transport.keys.keys import KeyPair
from lingualinked.transport.sockets.connection_monitor import ConnectionMonitor
from lingualinked.transport.sockets.handshakes import TIMEOUT_MS
from lingualinked.transport.sockets.socket_folder import make_socket_folder, new_socket_path
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint, TcpListener
from lingualinked.transport.sockets.waker import Waker
from lingualinked.transport.sockets.zap import DOMAIN, ZapHandler
from lingualinked.transport.wire.refusals import Refusals

logger = logging.getLogger("lingualinked.transport")

_CLOSE_TIMEOUT_S = 5.0
_MAX_UNREAD = 1_000  # messages of one peer in the inbox; the others stay with the peer
_MAX_UNSENT = 100_000  # messages to one peer; far more than are ever in flight to one that receives
# Of connections over TCP, so that one that was cut is closed. The answer to a heartbeat comes behind the bytes that are
# under way, which take half a minute on a slow link, and not while the receiver leaves a thousand messages unread.
_HEARTBEAT_MS = 10_000
_HEARTBEAT_TIMEOUT_MS = 60_000
_CONNECT_TIMEOUT_MS = 2_000  # then it tries again: less often, the kernel repeats what was dropped


class Sockets:
    """The mailbox's sockets and files: apart from the mailbox, so that its finalizer can close them."""

    def __init__(self, refusals: Refusals) -> None:
        self._pid = os.getpid()
        self.outboxes: dict[str, zmq.Socket[bytes]] = {}
        self.connecting: dict[str, ConnectionMonitor] = {}  # of outboxes over TCP whose connection has not come about
        self._files = contextlib.ExitStack()
        self._listeners: list[TcpListener] = []
        with contextlib.ExitStack() as undo:
            self.waker = Waker()
            undo.callback(self.waker.close)
            self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            self._zap = ZapHandler(self._context, refusals)
            undo.callback(self._zap.stop, _CLOSE_TIMEOUT_S)
            self.inbox = self._socket(zmq.PULL)
            undo.callback(self.inbox.close)
            self._zap.watch_handshakes(self.inbox)
            undo.pop_all()

    def bind_ipc(self, folder: str | None) -> str:
        """Listen on a new unix socket in a folder, or in a new one; `close` removes what was made."""
        if folder is None:
            folder = make_socket_folder()
            self._files.callback(shutil.rmtree, folder, ignore_errors=True)
        path = new_socket_path(folder)
        self._files.callback(Path(path).unlink, missing_ok=True)
        self.inbox.bind(f"ipc://{path}")
        return f"ipc://{path}"

    def bind_tcp(self, endpoint: TcpEndpoint) -> str:
        """Listen at an endpoint; return the address at which others reach it."""
        listener = TcpListener(endpoint)
        self._listeners.append(listener)
        listener.bind_socket(self.inbox)
        self._zap.guard(listener.gate)
        return listener.address

    def protect_inbox(self, keys: KeyPair, max_frame_bytes: int) -> None:
        """Let in nobody without an authorised key, and nothing that is too large; before the inbox is bound."""
        self.inbox.curve_server = True
        self.inbox.curve_publickey = keys.public.encode()
        self.inbox.curve_secretkey = keys.secret.encode()
        self.inbox.zap_domain = DOMAIN
        self.inbox.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self.inbox.maxmsgsize = max_frame_bytes
        self.inbox.rcvhwm = _MAX_UNREAD

    def authorise(self, public_key: str) -> None:
        """Accept connections from the holder of a key."""
        # Frames carry the key as user id, not the name: libzmq ends a user id at the first zero byte.
        self._zap.authorise(raw_key(public_key), public_key)

    def withdraw(self, public_key: str) -> None:
        """Accept no more connections from the holder of a key."""
        self._zap.withdraw(raw_key(public_key))

    def connect(self, name: str, address: str, public_key: str, keys: KeyPair) -> None:
        """Make an outbox for a peer, and connect it."""
        outbox = self._socket(zmq.PUSH)
        outbox.sndhwm = _MAX_UNSENT
        monitor = None
        try:
            outbox.curve_serverkey = public_key.encode()
            outbox.curve_publickey = keys.public.encode()
            outbox.curve_secretkey = keys.secret.encode()
            if address.startswith("tcp:"):
                _prepare_for_network(outbox, address)
                monitor = ConnectionMonitor(self._context, outbox)
            outbox.connect(address)
        except BaseException:
            if monitor is not None:
                monitor.close()
            outbox.close()
            raise
        self.outboxes[name] = outbox
        if monitor is not None:
            self.connecting[name] = monitor

    def read_events(self) -> None:
        """Follow the connections over TCP; those that have come about are `connecting` no more."""
        for name in [name for name, monitor in self.connecting.items() if monitor.has_connected()]:
            self.connecting.pop(name).close()

    def disconnect(self, name: str) -> None:
        """Close the outbox for a peer."""
        monitor = self.connecting.pop(name, None)
        if monitor is not None:
            monitor.close()
        self.outboxes.pop(name).close()

    def close(self) -> None:
        """Close all sockets, and remove the files; does nothing in a forked child."""
        if os.getpid() != self._pid:  # a forked child holds copies, and must not close the parent's sockets
            return
        self.waker.close()
        self.inbox.close()
        for listener in self._listeners:
            listener.close()
        while self.outboxes:
            self.disconnect(next(iter(self.outboxes)))
        self.remove_files()
        if not self._zap.stop(_CLOSE_TIMEOUT_S):
            logger.warning("a ZeroMQ context did not end within %s s; its threads keep running", _CLOSE_TIMEOUT_S)

    def remove_files(self) -> None:
        """Remove the unix socket, and the folder if the mailbox made it."""
        if os.getpid() == self._pid:
            self._files.close()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        socket.handshake_ivl = TIMEOUT_MS
        return socket


def _prepare_for_network(outbox: zmq.Socket[bytes], address: str) -> None:
    outbox.ipv6 = "[" in address
    outbox.connect_timeout = _CONNECT_TIMEOUT_MS
    outbox.heartbeat_ivl = _HEARTBEAT_MS
    outbox.heartbeat_timeout = outbox.heartbeat_ttl = _HEARTBEAT_TIMEOUT_MS

"""A listening TCP socket of our own making, which libzmq accepts connections on.

Knows numeric hosts, ports, and where others reach them; resolves no names, and knows no keys and no messages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING

import msgspec

from lingualinked.address import Address, parse_advertised
from lingualinked.errors import ArgumentError, ResourceError
from lingualinked.transport.sockets.gate import Gate

if TYPE_CHECKING:
    import zmq

LOOPBACK = "127.0.0.1"
_MAX_UNACCEPTED = 200  # connections that the kernel holds for libzmq
_DEFER_ACCEPT_S = 2  # connections that say nothing stay with the kernel for so long, and take no descriptor


class TcpEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a party listens over TCP, and where others reach it."""

    host: str = LOOPBACK  # numeric; 0.0.0.0 or :: for all addresses
    ports: tuple[int, int] | None = None  # the first and the last one to try; None: any free one
    advertise: str | None = None  # as in `Device`; None: the host and the port themselves


class TcpListener:
    """A listening socket at an endpoint: the first of its ports that is free.

    Raises ArgumentError if the endpoint is not one of this machine, or advertises other ports than it has, and
    ResourceError if no port is free.
    """

    def __init__(self, endpoint: TcpEndpoint) -> None:
        advertised = None if endpoint.advertise is None else parse_advertised(endpoint.advertise, "advertise")
        if advertised is not None and advertised.ports is not None:
            num_ports = 0 if endpoint.ports is None else endpoint.ports[1] - endpoint.ports[0] + 1
            if len(advertised.ports) != num_ports:
                raise ArgumentError(
                    f"advertise={endpoint.advertise!r} must have as many ports as there are to listen at, which are "
                    f"{_ports_text(endpoint.ports)}: each stands for one of them"
                )
        self._socket = _listen(endpoint)
        self.gate = Gate(self._socket)
        self.port: int = self._socket.getsockname()[1]
        host, port = endpoint.host, self.port
        if advertised is not None:
            host = advertised.host
            if advertised.ports is not None and endpoint.ports is not None:
                port = advertised.ports[port - endpoint.ports[0]]
        self.address = str(Address(host, port))  # where others reach it; its host may be a wildcard

    def bind_socket(self, zmq_socket: zmq.Socket[bytes]) -> None:
        """Make a ZeroMQ socket accept the connections; both it and this listener have to be closed."""
        import zmq

        handle = os.dup(self._socket.fileno())
        zmq_socket.set(zmq.USE_FD, handle)
        try:
            zmq_socket.bind(f"tcp://{LOOPBACK}:{self.port}")  # libzmq only reads the protocol
        except BaseException:
            os.close(handle)
            raise
        finally:
            zmq_socket.set(zmq.USE_FD, -1)

    def fileno(self) -> int:
        """Return the descriptor to poll for input."""
        return self._socket.fileno()

    def accept(self) -> socket.socket | None:
        """Accept a connection without libzmq; return None if none has come, or if it has ended already."""
        try:
            return self._socket.accept()[0]
        except OSError:
            return None

    def close(self) -> None:
        """Close this end of the socket; does nothing the second time."""
        self._socket.close()


def _listen(endpoint: TcpEndpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    first, last = endpoint.ports or (0, 0)
    for port in range(first, last + 1):
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if os.name == "posix":  # elsewhere it would let two processes listen at one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, endpoint.host != "::")
            if hasattr(socket, "TCP_DEFER_ACCEPT"):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _DEFER_ACCEPT_S)
            try:
                listener.bind((endpoint.host, port))
                listener.listen(_MAX_UNACCEPTED)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise ArgumentError(
                    f"can't listen at {Address(endpoint.host, port)} ({error.strerror}): name an IP address of this machine, "
                    "or 0.0.0.0 for all of them, and ports from 1024 on"
                ) from error
            listener.setblocking(False)
            undo.pop_all()
            return listener
    raise ResourceError(
        f"can't listen at {endpoint.host}, {_ports_text(endpoint.ports)}: in use already; name other ports, or end what "
        "listens there"
    )


def _ports_text(ports: tuple[int, int] | None) -> str:
    if ports is None:
        return "any free port"
    return f"port {ports[0]}" if ports[0] == ports[1] else f"ports {ports[0]}-{ports[1]}"

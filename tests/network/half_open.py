"""Connections that never finish their handshake, many at once, from a host's network.

Knows TCP and the first bytes of ZMTP.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

from network.hosts import Host

GREETING = b"\xff" + bytes(8) + b"\x7f"
"""The first ten bytes of every ZMTP 3 connection: whoever has sent them waits for the other's greeting."""


@dataclass(slots=True)
class Flood:
    """What has become of connections that were opened."""

    sockets: list[socket.socket] = field(default_factory=list)
    num_refused: int = 0

    def num_open(self) -> int:
        """Number of connections that the other side has accepted and not closed."""
        poll = select.poll()
        for each in self.sockets:
            poll.register(each, select.POLLOUT | select.POLLRDHUP)
        return sum(1 for _, events in poll.poll(0) if events == select.POLLOUT)

    def received(self) -> bytes:
        """Return the longest answer that a connection has received."""
        longest = b""
        for each in self.sockets:
            with contextlib.suppress(OSError):
                longest = max(longest, each.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT), key=len)
        return longest


@contextlib.contextmanager
def half_open(host: Host, address: str, port: int, number: int = 2000, first_bytes: bytes = b"") -> Iterator[Flood]:
    """Open so many connections from a host, send some first bytes on each, and keep them open within the ``with`` block.

    Nothing is waited for: where the other side accepts no more, connections stay in the making.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], number + 500), max(limits[1], number + 500)))
    flood = Flood()
    try:
        flood.sockets += host.sockets(number)
        for one in flood.sockets:
            one.setblocking(False)
            code = one.connect_ex((address, port))
            flood.num_refused += code not in (0, errno.EINPROGRESS)
        if first_bytes:
            poll = select.poll()
            by_descriptor = {each.fileno(): each for each in flood.sockets}
            for each in flood.sockets:
                poll.register(each, select.POLLOUT)
            for descriptor, events in poll.poll(1000):
                if events == select.POLLOUT:
                    with contextlib.suppress(OSError):
                        by_descriptor[descriptor].send(first_bytes)
        yield flood
    finally:
        for each in flood.sockets:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

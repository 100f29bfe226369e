"""A capture of every packet on every interface, and a search of what was said in it.

Knows Ethernet, IP and TCP; nothing of what the hosts say.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Self

from network import namespaces

_ALL_PROTOCOLS = 3  # ETH_P_ALL
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_BUFFER_BYTES = 256 << 20


class Flow(NamedTuple):
    """One direction of one TCP connection."""

    source: str
    source_port: int
    target: str
    target_port: int
    start: int = -1  # its first sequence number, since ports are used again; -1: it began before the capture


class Capture:
    """Packets of all interfaces of some namespaces, from its making to the end of the ``with`` block.

    Parameters
    ----------
    names : iterable of str
        The namespaces.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._sockets: list[socket.socket] = []
        self._packets: list[bytes] = []
        self.num_lost = 0
        self._end, self._told = socket.socketpair()
        try:
            for name in names:
                self._sockets.append(namespaces.inside(name, _open))
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(target=self._read, name="capture")
        self._thread.start()

    def _read(self) -> None:
        poll = select.poll()
        for each in (*self._sockets, self._told):
            poll.register(each, select.POLLIN)
        by_descriptor = {each.fileno(): each for each in self._sockets}
        is_over = False
        while not is_over:
            ready = dict(poll.poll(100))
            is_over = self._told.fileno() in ready and len(ready) == 1  # what has arrived before is read
            for descriptor in ready.keys() & by_descriptor.keys():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._packets.append(by_descriptor[descriptor].recv(1 << 17))

    def flows(self) -> dict[Flow, bytes]:
        """Return the bytes that each TCP connection carried each way, in order, each once."""
        parsed = [each for packet in self._packets if (each := _parse(packet)) is not None]
        starts: dict[Flow, set[int]] = defaultdict(set)
        for flow, sequence, _, begins in parsed:
            if begins:
                starts[flow].add(sequence)
        segments: dict[Flow, dict[int, bytes]] = defaultdict(dict)
        for flow, sequence, payload, _ in parsed:
            if payload:
                start = min(starts[flow], key=lambda first, at=sequence: (at - first) % 2**32, default=-1)
                of_flow = segments[flow._replace(start=start)]
                of_flow[sequence] = max(of_flow.get(sequence, b""), payload, key=len)
        return {flow: _in_order(of_flow) for flow, of_flow in segments.items()}

    def find(self, pattern: bytes) -> list[str]:
        """Return where a pattern occurs: in the streams of connections, or in any single packet of any protocol."""
        found = [f"{flow}" for flow, stream in self._kept_flows().items() if pattern in stream]
        return found or [f"a packet of {len(packet)} bytes" for packet in self._packets if pattern in packet]

    def _kept_flows(self) -> dict[Flow, bytes]:
        if not hasattr(self, "_flows"):
            self._flows = self.flows()
        return self._flows

    @property
    def num_bytes(self) -> int:
        """Bytes of all captured packets; one that crosses several interfaces counts for each."""
        return sum(map(len, self._packets))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.send(b".")
        self._thread.join()
        for each in self._sockets:
            statistics = each.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
            self.num_lost += struct.unpack("II", statistics)[1]
        self._close()

    def _close(self) -> None:
        for each in (*self._sockets, self._end, self._told):
            each.close()


def _open() -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    opened.setsockopt(socket.SOL_SOCKET, 33, _BUFFER_BYTES)  # SO_RCVBUFFORCE: more than the system's limit
    opened.setblocking(False)
    return opened


def _parse(packet: bytes) -> tuple[Flow, int, bytes, bool] | None:
    """Return a TCP segment's flow, sequence number, payload, and whether it begins the flow; None for all but IPv4."""
    if len(packet) < 54 or packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
        return None
    tcp = 14 + 4 * (packet[14] & 15)
    end = 14 + int.from_bytes(packet[16:18]) or len(packet)  # short packets are padded
    source_port, target_port, sequence = struct.unpack_from("!HHI", packet, tcp)
    payload = packet[tcp + 4 * (packet[tcp + 12] >> 4) : max(end, 14)]
    flow = Flow(socket.inet_ntoa(packet[26:30]), source_port, socket.inet_ntoa(packet[30:34]), target_port)
    return flow, sequence, payload, bool(packet[tcp + 13] & 2)


def _in_order(segments: dict[int, bytes]) -> bytes:
    """Join segments by sequence number; what was sent again counts once. Numbers that wrap around begin anew."""
    stream = bytearray()
    expected: int | None = None
    for sequence in sorted(segments):
        payload = segments[sequence]
        seen = 0 if expected is None else max(0, expected - sequence)
        stream += payload[seen:]
        expected = max(expected or 0, sequence + len(payload))
    return bytes(stream)

"""Emulates a slower link between processes of one machine: messages are due when they would have arrived on it.

The sender says when, the receiver holds them until then, so that neither needs a thread and a busy receiver loses nothing.
Knows bytes and the machine's monotonic clock, which all its processes share; no sockets.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time

from lingualinked.transport.delivery import Delivery

_SLEEP_S = 2e-3  # a poll counts whole milliseconds: what is due sooner is slept for


class ShapedLink:
    """A link that carries one message at a time, at a rate, each for a while on its way.

    Parameters
    ----------
    bandwidth_bytes_per_s : float
        Rate; may be infinite.
    latency_s : float
        From the last byte's departure to its arrival.
    """

    def __init__(self, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._latency_s = latency_s
        self._free_s = self._last_due_s = 0.0

    def change(self, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        """Take other figures for the messages that follow."""
        self._bandwidth_bytes_per_s, self._latency_s = bandwidth_bytes_per_s, latency_s

    def due_us(self, num_bytes: int) -> int:
        """Send so many bytes now, behind those that are being sent; say when they arrive (monotonic microseconds; 0: now)."""
        if self._bandwidth_bytes_per_s == math.inf and not self._latency_s and self._last_due_s <= time.monotonic():
            return 0
        self._free_s = max(self._free_s, time.monotonic()) + num_bytes / self._bandwidth_bytes_per_s
        self._last_due_s = max(self._last_due_s, self._free_s + self._latency_s)  # nothing overtakes on a link
        return math.ceil(self._last_due_s * 1e6)


class Held:
    """Deliveries that have come and are not due yet."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Delivery]] = []
        self._order = itertools.count()
        self._num_bytes: dict[str, int] = {}  # by sender

    def add(self, due_us: int, delivery: Delivery) -> None:
        """Hold a delivery until it is due."""
        self._num_bytes[delivery.sender] = self.num_bytes(delivery.sender) + delivery.num_bytes
        heapq.heappush(self._heap, (due_us, next(self._order), delivery))

    def take(self) -> Delivery | None:
        """Give the delivery that has been due longest, if one is; one that is due within 2 ms is waited for."""
        left_s = self.left_s
        if left_s > _SLEEP_S:  # also if none is held
            return None
        if left_s > 0:
            time.sleep(left_s)
        delivery = heapq.heappop(self._heap)[2]
        self._num_bytes[delivery.sender] -= delivery.num_bytes
        return delivery

    def num_bytes(self, sender: str) -> int:
        """Return the bytes that are held of a sender's."""
        return self._num_bytes.get(sender, 0)

    @property
    def left_s(self) -> float:
        """Seconds until the next one is due; infinite if none is held."""
        return self._heap[0][0] / 1e6 - time.monotonic() if self._heap else math.inf

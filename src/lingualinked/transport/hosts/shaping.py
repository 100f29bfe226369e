"""Emulates a slower link between processes of one machine.

The sender computes when each message would have arrived, and the receiver holds it until then: neither needs a thread,
and a busy receiver loses nothing. Knows bytes and the monotonic clock that the processes of a machine share; no sockets.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time

from lingualinked.transport.wire.delivery import Delivery

_MAX_SLEEP_S = 2e-3  # a poll waits whole milliseconds: shorter waits are slept


class ShapedLink:
    """A link that transmits one message at a time, with a bandwidth (may be infinite) and a latency after the last byte."""

    def __init__(self, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._latency_s = latency_s
        self._free_s = self._last_due_s = 0.0

    def update(self, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        """Change bandwidth and latency for the messages that follow."""
        self._bandwidth_bytes_per_s, self._latency_s = bandwidth_bytes_per_s, latency_s

    def schedule_message(self, num_bytes: int) -> int:
        """Queue a message behind those being transmitted; return when it arrives (monotonic microseconds; 0: now)."""
        if self._bandwidth_bytes_per_s == math.inf and not self._latency_s and self._last_due_s <= time.monotonic():
            return 0
        self._free_s = max(self._free_s, time.monotonic()) + num_bytes / self._bandwidth_bytes_per_s
        self._last_due_s = max(self._last_due_s, self._free_s + self._latency_s)  # nothing overtakes on a link
        return math.ceil(self._last_due_s * 1e6)


class DelayQueue:
    """Deliveries that have been received and are not due yet."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Delivery]] = []
        self._order = itertools.count()
        self._num_bytes: dict[str, int] = {}  # by sender

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, due_us: int, delivery: Delivery) -> None:
        """Hold a delivery until it is due."""
        self._num_bytes[delivery.sender] = self.num_bytes(delivery.sender) + delivery.num_bytes
        heapq.heappush(self._heap, (due_us, next(self._order), delivery))

    def pop_due(self) -> Delivery | None:
        """Return the delivery that has been due longest, or None; wait for one that is due within 2 ms."""
        left_s = self.next_due_in_s
        if left_s > _MAX_SLEEP_S:  # also if the queue is empty
            return None
        if left_s > 0:
            time.sleep(left_s)
        delivery = heapq.heappop(self._heap)[2]
        self._num_bytes[delivery.sender] -= delivery.num_bytes
        return delivery

    def num_bytes(self, sender: str) -> int:
        """Return the bytes that are held from a sender."""
        return self._num_bytes.get(sender, 0)

    @property
    def next_due_in_s(self) -> float:
        """Seconds until the next delivery is due; infinite if the queue is empty."""
        return self._heap[0][0] / 1e6 - time.monotonic() if self._heap else math.inf

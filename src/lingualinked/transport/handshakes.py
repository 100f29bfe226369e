"""Which connections ended before they had shown an authorised key, told from the events of a socket's monitor.

Knows no keys and no messages; the events name a connection by its descriptor, and a handshake's success not at all.
"""

from __future__ import annotations

import zmq

EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
TIMEOUT_MS = 2_000  # of a handshake
_SETTLED_AFTER_S = TIMEOUT_MS / 1000 + 1  # with some to spare: what is open that long has succeeded


class Handshakes:
    """Count of the connections that failed in the handshake, each of them once; for use from one thread.

    What was accepted, less what succeeded and what may still do so, has failed. Whose success it was is not said, so
    that connections count as undecided until they end, or no handshake lasts as long: the count may be late by that.
    """

    def __init__(self) -> None:
        self._undecided: dict[
            int, float
        ] = {}  # by descriptor, the oldest first: when it is decided, if it is open then
        self.num_open = 0  # connections, whether their handshake has succeeded yet or not
        self._num_accepted = 0
        self._num_succeeded = 0
        self._num_known = 0
        self._num_failed = 0

    def note(self, event: int, descriptor: int, now_s: float) -> None:
        """Take one event."""
        if event == zmq.EVENT_ACCEPTED:
            self._num_accepted += 1
            self.num_open += 1
            self._undecided[descriptor] = now_s + _SETTLED_AFTER_S
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_succeeded += 1
        elif event == zmq.EVENT_DISCONNECTED:
            self._undecided.pop(descriptor, None)
            self.num_open -= 1

    def note_known(self) -> None:
        """Note that one connection fails that has been counted elsewhere."""
        self._num_known += 1

    def settle(self, now_s: float) -> None:
        """Decide on what is open for longer than a handshake lasts; all events until now must have been noted."""
        while self._undecided and self.next_s() <= now_s:
            del self._undecided[next(iter(self._undecided))]

    def next_s(self) -> float:
        """Return when `settle` is due next; infinity if nothing is undecided."""
        return next(iter(self._undecided.values()), float("inf"))

    def take_failed(self) -> int:
        """Return how many more are known to have failed than at the last call."""
        num_failed = self._num_accepted - self._num_succeeded - self._num_known - len(self._undecided)
        num_new = max(num_failed - self._num_failed, 0)
        self._num_failed += num_new
        return num_new

"""Counts connections that ended without showing an authorised key, from the events of a socket's monitor.

Knows no keys and no messages. Events name a connection by its descriptor, except for the success of a handshake.
"""

from __future__ import annotations

import zmq

EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
TIMEOUT_MS = 2_000  # of a handshake
_DECIDED_AFTER_S = TIMEOUT_MS / 1000 + 1  # with a margin: a connection that is open this long has succeeded


class Handshakes:
    """Counts the connections that failed in the handshake, each of them once; for use from one thread.

    Failed = accepted - succeeded - refused elsewhere - undecided. An event of success does not name its connection, so
    that each connection stays undecided until it ends, or until it has outlasted every handshake: the count may lag by that.
    """

    def __init__(self) -> None:
        # By descriptor, oldest first: when a connection counts as successful if it is still open.
        self._undecided: dict[int, float] = {}
        self.num_open = 0  # connections, before and after their handshake
        self._num_accepted = 0
        self._num_succeeded = 0
        self._num_refused = 0
        self._num_failed = 0

    def record_event(self, event: int, descriptor: int, now_s: float) -> None:
        """Record one event of the monitor."""
        if event == zmq.EVENT_ACCEPTED:
            self._num_accepted += 1
            self.num_open += 1
            self._undecided[descriptor] = now_s + _DECIDED_AFTER_S
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_succeeded += 1
        elif event == zmq.EVENT_DISCONNECTED:
            self._undecided.pop(descriptor, None)
            self.num_open -= 1

    @property
    def num_waiting(self) -> int:
        """Number of open connections that may not have completed their handshake, or have done so within seconds."""
        return len(self._undecided)

    def exclude_refused(self) -> None:
        """Exclude one connection that was refused, and counted, elsewhere."""
        self._num_refused += 1

    def expire_undecided(self, now_s: float) -> None:
        """Count connections that have outlasted every handshake as successful; all events until now must be recorded."""
        while self._undecided and self.next_expiry_s() <= now_s:
            del self._undecided[next(iter(self._undecided))]

    def next_expiry_s(self) -> float:
        """Return when `expire_undecided` is due next (monotonic seconds); infinity if nothing is undecided."""
        return next(iter(self._undecided.values()), float("inf"))

    def pop_num_failed(self) -> int:
        """Return how many connections are known to have failed since the last call."""
        num_failed = self._num_accepted - self._num_succeeded - self._num_refused - len(self._undecided)
        num_new = max(num_failed - self._num_failed, 0)
        self._num_failed += num_new
        return num_new

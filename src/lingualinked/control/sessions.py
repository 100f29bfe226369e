"""How many sessions are in flight, estimated from steps: a number that holds until two windows in a row differ from it.

Knows steps and their times; nothing of devices, plans or what is done about it.
"""

from __future__ import annotations

import math
from collections import deque

from lingualinked.control.stability import expected_stable_s
from lingualinked.telemetry.samples import StepSample

_WINDOWS_PER_HORIZON = 24
_LEAST_CHANGE = 0.6  # sessions
_LEAST_SHARE = 0.25  # of the number that holds
_MOST_CHANGES = 16
_MOST_SESSIONS = 1024  # whose latest steps are remembered
_SELDOM = 0.25  # of a session more than the number: one that is in flight so seldom does not count


class SessionLevel:
    """The sessions in flight, as a number that holds until it has plainly changed.

    Steps in flight at the same time are averaged over windows of time in which there was any: a session that computes
    between its steps counts a little less, and one after the other counts as one. The number changes where two windows
    in a row, a 24th of the horizon each, lie plainly above it, or below. ``planned`` counts until steps tell otherwise.
    """

    def __init__(self, planned: int, horizon_s: float) -> None:
        self._num_sessions = planned
        self._horizon_s = horizon_s
        self._changes: deque[float] = deque(maxlen=_MOST_CHANGES)
        self._last_done_s = -math.inf
        self._ends_s: dict[int, float] = {}  # of the latest step of each session, the one that stepped last at the end
        self._in_flight_s = self._busy_s = 0.0  # of the window that is being filled
        self._before = float(planned)  # mean of the window before

    @property
    def num_sessions(self) -> int:
        """The number that holds now."""
        return self._num_sessions

    def expected_stable_s(self, time_s: float) -> float:
        """Return the seconds for which the number is expected to hold."""
        return expected_stable_s(self._changes, time_s, self._horizon_s)

    def observe(self, sample: StepSample) -> bool:
        """Learn from a step that has come back; return whether the number has changed."""
        done_s = sample.end_s
        # Chunks of a prompt that are in flight at once are one session's.
        before_s = self._ends_s.pop(sample.session, -math.inf)
        self._in_flight_s += max(0.0, done_s - max(sample.time_s, before_s))
        self._ends_s[sample.session] = max(done_s, before_s)
        if len(self._ends_s) > _MOST_SESSIONS:
            del self._ends_s[next(iter(self._ends_s))]
        self._busy_s += max(0.0, done_s - max(self._last_done_s, sample.time_s))
        self._last_done_s = max(self._last_done_s, done_s)
        if self._busy_s < self._horizon_s / _WINDOWS_PER_HORIZON:
            return False
        mean, before = self._in_flight_s / self._busy_s, self._before
        self._in_flight_s, self._busy_s, self._before = 0.0, 0.0, mean
        holds = self._num_sessions
        change = max(_LEAST_CHANGE, _LEAST_SHARE * holds)
        if not (min(mean, before) > holds + change or max(mean, before) < holds - change):
            return False
        self._num_sessions = max(1, math.ceil(mean - _SELDOM))
        self._changes.append(done_s)
        return True

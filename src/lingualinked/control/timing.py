"""Why the balancer is to decide, and when it may.

Knows reasons and times; nothing of plans and devices, nor what is decided.
"""

from __future__ import annotations

import dataclasses

_MOST_DOUBLINGS = 10
_MINOR_PAUSE_S = 5.0  # between decisions because of minor changes: each takes the caller some 15 ms of processor time


@dataclasses.dataclass(frozen=True, slots=True)
class Trigger:
    """What has happened, so that something is to be decided."""

    text: str  # in plain words; a decision quotes it
    requires_move: bool = False  # layers have to move, whatever it costs
    is_large: bool = (
        False  # it is decided at once; a minor change waits until the pause after the last decision is over
    )

    def beside(self, waiting: Trigger | None) -> Trigger:
        """Return what is to be decided where another trigger waits already: this one, as urgent as both."""
        if waiting is None:
            return self
        return Trigger(
            self.text,
            requires_move=self.requires_move or waiting.requires_move,
            is_large=self.is_large or waiting.is_large,
        )


class Timing:
    """When the balancer may decide of its own accord: not soon after a migration, and ever later after failures."""

    def __init__(self, cooldown_s: float, horizon_s: float) -> None:
        self._cooldown_s = cooldown_s
        self._longest_wait_s = max(horizon_s, cooldown_s)
        self._not_before_s = 0.0  # nothing is decided until then
        self._minor_not_before_s = 0.0  # and nothing minor until then
        self._migrated_s = 0.0  # when the last migration ended
        self._num_failed = 0  # migrations since one succeeded
        self._num_rejected = 0  # moves that were not worth it yet, since something changed

    def may_decide(self, trigger: Trigger, time_s: float) -> bool:
        """Whether what has happened may be decided now."""
        return time_s >= self._not_before_s and (trigger.is_large or time_s >= self._minor_not_before_s)

    def is_disturbed(self, time_s: float) -> bool:
        """Whether a step that began then ran beside a migration, and shows no device's speed."""
        return time_s < self._migrated_s

    def record_change(self) -> None:
        """Record that speeds or sessions have changed: what was rejected before is a new question."""
        self._num_rejected = 0

    def record_decision(self, time_s: float) -> None:
        """Record that something was decided."""
        self._minor_not_before_s = time_s + _MINOR_PAUSE_S

    def record_rejection(self, time_s: float) -> None:
        """Record that a move was not possible or not worth it, which may be otherwise later on."""
        self._num_rejected += 1
        self._minor_not_before_s = time_s + self._wait_s(self._num_rejected)

    def record_migration(self, time_s: float) -> None:
        """Record that layers have moved."""
        self._migrated_s = time_s
        self._not_before_s = time_s + self._cooldown_s
        self._num_failed = self._num_rejected = 0

    def record_failure(self, time_s: float) -> None:
        """Record that layers could not be moved."""
        self._migrated_s = time_s
        self._num_failed += 1
        self._not_before_s = time_s + self._wait_s(self._num_failed)

    def _wait_s(self, times: int) -> float:
        """Return the seconds before it is tried again: longer and longer, up to the longest wait."""
        return min(self._cooldown_s * 2.0 ** min(times, _MOST_DOUBLINGS), self._longest_wait_s)

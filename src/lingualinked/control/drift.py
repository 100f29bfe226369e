"""Whether speeds have slowly moved away from those that were decided with, or are known well only by now.

Knows levels of speed; a change that is seen at once is not its business.
"""

from __future__ import annotations

from collections.abc import Mapping

from lingualinked.control.speed import SpeedLevel
from lingualinked.control.timing import Trigger

_MANY_STEPS = 128  # after which speeds are known well


class SpeedDrift:
    """How the speeds of now differ from those of the last decision."""

    def __init__(self, min_gain: float) -> None:
        self._largest_ratio = 1 / (1 - min_gain)
        self._decided_slowdowns: dict[str, float] = {}
        self._are_sure = False  # whether they were known well at the last decision

    def record_decision(self, slowdowns: dict[str, float]) -> None:
        """Record the speeds that something was decided with."""
        self._decided_slowdowns = slowdowns

    def record_shift(self) -> None:
        """Record that a speed has changed: it has to become known well again."""
        self._are_sure = False

    def find_trigger(self, levels: Mapping[str, SpeedLevel]) -> Trigger | None:
        """Return why to decide again by the speeds of devices, if they are known well; ``None`` if there is no need."""
        if any(level.num_samples < _MANY_STEPS for level in levels.values()):
            return None
        if not self._are_sure:
            self._are_sure = True
            return Trigger(f"speeds are known from {_MANY_STEPS} steps")
        for name, level in levels.items():
            ratio = level.slowdown / self._decided_slowdowns.get(name, 1.0)
            if max(ratio, 1 / ratio) > self._largest_ratio:
                return Trigger(f"device {name!r} takes {ratio:.2f} times as long as at the last decision")
        return None

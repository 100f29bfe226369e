"""Medians, spreads and ratios of repeated measurements.

Knows numbers only.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Repeats:
    """The results of one repeated measurement, in the order of the runs."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    def text(self, digits: int = 2, unit: str = "") -> str:
        """Format the median, and the lowest and highest value."""
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(left: Repeats, right: Repeats) -> Repeats:
    """Divide pair by pair: a machine's speed drifts, and both values of a pair drift together."""
    return Repeats([a / b for a, b in zip(left.values, right.values, strict=True)])

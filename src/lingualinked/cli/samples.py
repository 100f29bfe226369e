"""Repeated measurements and what is said of them.

Knows numbers only.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """Repeats of one measurement.

    Parameters
    ----------
    values : sequence of float
        In the order of the runs.
    """

    values: Sequence[float]

    @property
    def median(self) -> float:
        """Middle value."""
        return statistics.median(self.values)

    def text(self, digits: int = 2, unit: str = "") -> str:
        """Write median and spread."""
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(left: Samples, right: Samples) -> Samples:
    """Divide run by run: machines drift, pairs drift together."""
    return Samples([a / b for a, b in zip(left.values, right.values, strict=True)])

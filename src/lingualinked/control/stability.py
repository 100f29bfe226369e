"""How long something is expected to hold that changes now and then.

Knows times; not what has changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def expected_stable_s(changes_s: Sequence[float], time_s: float, horizon_s: float) -> float:
    """Return the seconds to the next change: as long as there was none, before or until now, and at most ``horizon_s``."""
    if len(changes_s) < 2 or time_s - changes_s[-1] > horizon_s:  # when what held before the first began, nobody saw
        return horizon_s
    shortest_s = min(after - before for before, after in itertools.pairwise(changes_s))
    return min(horizon_s, max(shortest_s, time_s - changes_s[-1]))

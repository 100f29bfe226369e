"""The sweep of caps on what a part of a placement may cost, where the costliest part counts.

Knows costs of parts; not which placement is best within a cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lingualinked.planning.placement.problem import Floats, Placement
from lingualinked.planning.placement.tables import PROVEN, TOLERANCE, Costs

STRICTLY = 1e-11
"""Relative. A cost within this share of a value counts as equal to it."""

STEP_GROWTH = 16
"""Caps that are skipped on the way down from a known placement grow by this factor, until one is too low."""


def sweep_caps(
    costs: Costs,
    known: Placement,
    value_of: Callable[[Placement], float],
    best_within: Callable[[float, float], tuple[Placement, float]],
    *,
    bound: float = 0.0,
    gap: float = 0.0,
) -> tuple[Placement, float]:
    """Find the placement for which the larger of its costliest part and of a second measure is least.

    Parameters
    ----------
    costs : Costs
        Of the parts.
    known : tuple of Span
        A placement, or none if none is known.
    value_of : callable
        From a placement to the larger of the two.
    best_within : callable
        From a cap on the costs of parts, and a value, to a placement of less value within the cap, if one is found, and
        a bound on the second measure of all that are within the cap.
    bound : float
        On the second measure of all placements.
    gap : float
        Half the share of the value that may remain between it and its proven bound.

    Returns
    -------
    tuple of tuple of Span and float
        The placement, and a proven lower bound on the value; none and ``inf`` if there is no placement.
    """
    value = value_of(known) if known else math.inf
    caps, step = _caps(costs, value), 1
    # a placement's parts may cost less than the bound: the last cap below it counts
    low, high = max(0, int(np.searchsorted(caps, bound * (1 - TOLERANCE))) - 1), len(caps)
    open_bound, is_low_excluded = math.inf, False
    while low < high and min(open_bound, caps[low]) < value * (1 - 2 * gap):
        # 1) from the best known downwards in growing steps, then by halves
        at = (low + high) // 2 if is_low_excluded else max(low, high - step)
        step *= STEP_GROWTH
        placement, least = best_within(float(caps[at]), value)
        if placement and value_of(placement) < value:
            known, value = placement, value_of(placement)
        least = min(least, value)
        if least > caps[at]:
            # 2) what is within the cap is worse than the cap: seek above it
            is_low_excluded, low = True, at + 1
            if least < value * (1 - PROVEN):
                open_bound = min(open_bound, least)
        else:
            # 3) what is not within the cap is worse than the best within it: seek below it
            high = at
            if value > caps[at] * (1 + PROVEN):  # the best within it was not found
                open_bound = min(open_bound, caps[at])
        high = min(high, int(np.searchsorted(caps, value * (1 - TOLERANCE))))
    return (known, min(value, open_bound, caps[low] if low < high else value)) if known else ((), math.inf)


def _caps(costs: Costs, below: float) -> Floats:
    """List the costs of all parts, those below a value."""
    parts = (costs.span, costs.hop, costs.enter, costs.leave, *costs.close.values())
    values = np.unique(np.concatenate([part.ravel() for part in parts]))
    return values[values < min(below * (1 - STRICTLY), math.inf)]

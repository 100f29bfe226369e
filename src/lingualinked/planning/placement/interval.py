"""The least interval between steps with some sessions in flight: where bottleneck and latency meet.

Knows routes, costs and caps on the bottleneck; how placements within a cap are searched is told by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lingualinked.planning.placement.costs import latency_costs
from lingualinked.planning.placement.orders import Route, best_along
from lingualinked.planning.placement.problem import Problem, interval_s
from lingualinked.planning.placement.spans import TOLERANCE, SpanTables

STRICTLY = 1e-11
"""Relative. A bottleneck within this share of an interval counts as equal to it."""

FINEST = 1e-6
"""Relative width of the range of caps at which the sweep along one order stops."""


def search_interval(
    problem: Problem,
    tables: SpanTables,
    quickest: Callable[[float], tuple[Route | None, float]],
    start: tuple[Route | None, float],
    limit: float,
    max_searches: float = math.inf,
) -> tuple[Route | None, float]:
    """Search the placement with the least interval, the larger of its bottleneck and its latency per session.

    The least latency within a cap on the bottleneck falls as the cap rises, so the optimum lies where the two meet.
    Below the interval of the best placement so far, the quickest one within a cap is either better or proves that
    none is: placements within the cap take at least its latency, all others have a bottleneck of at least the interval.

    Parameters
    ----------
    problem : Problem
        With `Problem.num_sessions`.
    tables : SpanTables
        Of it.
    quickest : callable
        From a cap on the bottleneck, in seconds, to the placement of least latency that was found, and a proven lower
        bound on the latency of all within the cap; ``inf`` if there are none.
    start : tuple of Route or None, and float
        The placement of least bottleneck that was found, and a proven lower bound on all bottlenecks; ``None`` and 0
        where it was not searched, as with one session the latency nearly always decides.
    limit : float
        The most seconds that a device or link may be busy.
    max_searches : float
        Calls of `quickest` after which it stops; ``inf``: when nothing better is left.

    Returns
    -------
    tuple of Route or None, and float
        The best that was found, its value being the interval, and a proven lower bound on all there are.
    """
    found, bound = None, start[1]
    if start[0] is not None:
        found = _sweep(problem, tables, start[0].order, start[0].value, limit)
    while (found is None or found.value > bound * (1 + STRICTLY)) and max_searches > 0:
        best_s = math.inf if found is None else found.value
        route, latency_s = quickest(min(limit, best_s * (1 - STRICTLY)))
        bound = max(bound, min(best_s, latency_s / problem.num_sessions))
        if route is None:
            break
        better = _valued(problem, route)
        if better.value < best_s:
            found = better
        if route.value / problem.num_sessions >= better.value * (1 - STRICTLY):
            break  # limited by latency alone, which lower caps only raise
        swept = _sweep(problem, tables, route.order, bound, better.value)
        if swept is not None and swept.value < better.value:
            found = swept
        max_searches -= 1
    return found, bound


def _sweep(problem: Problem, tables: SpanTables, order: Sequence[int], low: float, high: float) -> Route | None:
    """Find the least interval along one order by halving the range of caps; bottlenecks below `low` do not exist."""
    found, cap = None, low
    while True:
        route = best_along(latency_costs(problem, tables, cap), order)
        meets = route is not None
        if route is not None:
            valued = _valued(problem, route)
            found = valued if found is None or valued.value < found.value else found
            meets = valued.value <= cap * (1 + TOLERANCE)
        if meets:
            high = cap
        else:
            low = cap
        high = min(high, math.inf if found is None else found.value)
        if high - low <= FINEST * low or math.isinf(high):
            return found
        cap = (low + high) / 2


def _valued(problem: Problem, route: Route) -> Route:
    return Route(interval_s(problem, route.placement), route.placement)

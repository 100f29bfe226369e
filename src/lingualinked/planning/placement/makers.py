"""Branch and bound over the devices that make what skips stages: a shortcut's cost depends on both of its ends.

Knows problems and shortcuts; the caller passes the function that solves a problem with some makers.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable

import numpy as np

from lingualinked.planning.placement.problem import Placement, Problem
from lingualinked.planning.placement.shortcuts import maker_of
from lingualinked.planning.placement.tables import PROVEN

MAX_NODES = 200
"""Problems that are solved for one. Links that are alike need one, as a rule; a few that differ, one for each maker in question."""


def branch_over_makers(
    problem: Problem,
    solve: Callable[[Problem], tuple[Placement, float]],
    value_of: Callable[[Placement], float],
    *,
    gap: float = 0.0,
) -> tuple[Placement, float]:
    r"""Find the placement of least value, where shortcuts cost what the link from their maker's device costs.

    The linear programme prices a span by its device and layers, and does not know where the layer lies that makes what the span
    uses: it takes the nearest device of those that may (`shortcuts.tabulate`), so its optimum is a bound. Where the placement that it
    finds has a farther maker, the problem is split in two: in one, that device makes it, whose cost is then exact; in the
    other, any other device does. The part with the least bound is split next, until none is below the best value by more than the gap.

    Parameters
    ----------
    problem : Problem
        With shortcuts.
    solve : callable
        From a problem to its placement, or none, and a bound.
    value_of : callable
        From a placement to its true value; ``inf`` if it exceeds a limit.
    gap : float
        Share of the value that may remain between it and its proven bound.

    Returns
    -------
    tuple of tuple of Span and float
        The placement, none if there is none; and a proven lower bound on the value.
    """
    count = itertools.count()
    best: Placement = ()
    value, open_bound = math.inf, math.inf
    placement, bound = solve(problem)
    heap = [(bound, next(count), problem, placement)]
    solved = 1
    while heap and heap[0][0] < value * (1 - max(gap, PROVEN)):
        bound, _, problem, placement = heapq.heappop(heap)
        if not placement:
            continue
        if value_of(placement) < value or not best:
            best, value = placement, value_of(placement)
        made_at = _farthest(problem, placement)
        if made_at is None or solved >= MAX_NODES:
            open_bound = min(open_bound, bound)
            continue
        assert problem.shortcuts is not None
        maker = maker_of([(span.device, span.start, span.end) for span in placement], made_at)
        is_maker = np.arange(problem.num_devices) == maker
        for devices in (is_maker, ~is_maker):
            part = dataclasses.replace(problem, shortcuts=problem.shortcuts.only(made_at, devices))
            assert part.shortcuts is not None
            if part.shortcuts.makers[made_at].any():
                placement, bound_of_part = solve(part)
                solved += 1
                if placement:
                    heapq.heappush(heap, (max(bound, bound_of_part), next(count), part, placement))
    least = min([open_bound, *(each[0] for each in heap)])
    return best, float(min(value, least))


def _farthest(problem: Problem, placement: Placement) -> int | None:
    """Return the layer whose maker costs most beyond the nearest that may be; ``None`` if all are the nearest."""
    shortcuts = problem.shortcuts
    assert shortcuts is not None
    spans = [(span.device, span.start, span.end) for span in placement]
    most, found = 0.0, None
    for made_at, makers in shortcuts.makers.items():
        if makers.sum() == 1:
            continue
        maker = maker_of(spans, made_at)
        for index, (user, start, end) in enumerate(spans):
            cost = functools.partial(
                shortcuts.seconds, made_at, user=user, span=(start, end), num_layers=problem.num_layers
            )
            others = [each for each in np.flatnonzero(makers).tolist() if each != user]
            closes = index > 0 and user == placement[0].device
            beyond = cost(maker=maker) - (0.0 if closes else min((cost(maker=each) for each in others), default=0.0))
            if beyond > most:
                most, found = beyond, made_at
    return found

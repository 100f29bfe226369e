"""The search for the cheapest placement of a linear programme: few arcs first, all that matter, then whole paths.

Knows programmes and their prices; not what the costs stand for.
"""

from __future__ import annotations

import math

import numpy as np

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.placement.arcs import Arcs
from lingualinked.planning.placement.problem import Placement
from lingualinked.planning.placement.programme import INFEASIBLE, Answer, Prices, Programme
from lingualinked.planning.placement.tables import PROVEN, TOLERANCE

MAX_ARCS = 6000
"""Arcs that a programme is given at once; the interior point method takes some 0.1 s for as many."""

MAX_ROUNDS = 20
"""Programmes after which prices are as good as they get; four to six are common."""

WIDTHS = (300, 3000, 30000)
"""Paths that are kept behind each stage: while prices are sought, and where they leave a gap. They take 0.05 to 5 s.

Where a gap is accepted, the last number is not tried: on 32 devices with 128 layers it took 48 s for 0.1 %.
"""

_FAR = 5  # a limit that exceeds the optimum by this factor is too large a scale for it


def cheapest(
    programme: Programme, limit: float, known: Placement = (), *, prices: Prices | None = None, gap: float = 0.0
) -> Answer:
    """Find the cheapest placement, if it costs at most a limit.

    Parameters
    ----------
    programme : Programme
        Of its costs.
    limit : float
        What the placement may cost at most; ``inf``: anything.
    known : tuple of Span
        A placement within the limit, if one is known: returned if nothing better is found.
    prices : Prices, optional
        To begin with, from a similar programme.
    gap : float
        Share of the cost that may remain between it and its proven bound.

    Returns
    -------
    Answer
        Without a placement if none is found; its bound is the limit or more if there is none.

    Raises
    ------
    InfeasiblePlanError
        If linprog finds no flow (status 2) although a placement is known.
    LingualinkedError
        If linprog stops with another status than 0 and 2.
    """
    search = _Search(programme, min(limit, programme.ceiling) * (1 + TOLERANCE), known, gap, prices)
    # 1) prices at which few arcs are left
    arcs = search.price()
    # 2) the relaxation over all of them; 3) where the flow is fractional, paths that use each device once
    if arcs is None or not search.relax(arcs):
        search.branch()
    is_empty = not search.found and search.bound >= search.limit * (1 - PROVEN)
    return Answer(search.found, limit if is_empty else search.bound, search.prices)


class _Search:
    """The state of a search for the cheapest placement: the best so far, the limit that it sets, and the bound."""

    def __init__(self, programme: Programme, limit: float, known: Placement, gap: float, prices: Prices | None) -> None:
        self._programme, self._gap = programme, max(gap, PROVEN)
        self.limit, self.found = limit, known
        self.prices = prices or programme.no_prices()
        self.bound = -math.inf

    @property
    def is_done(self) -> bool:
        """Whether nothing that is better by more than the gap can be left."""
        return self.bound >= self.limit * (1 - self._gap)

    def price(self) -> Arcs | None:
        """Solve programmes over some of the arcs until their prices leave few, and return those."""
        programme = self._programme
        most, pool = MAX_ARCS, np.empty(0, dtype=int)
        arcs, self.bound = programme.arcs(self.prices, self.limit, most)
        for _ in range(MAX_ROUNDS):
            if len(arcs) <= most:
                return arcs
            some = arcs[arcs.nearest(most) | np.isin(arcs.keys, pool)]
            flow = programme.minimise(some, self.limit, may_exceed=True)
            if flow.status == INFEASIBLE or not flow.order:  # among equally short paths, no whole one was taken
                most *= 2
                arcs, _ = programme.arcs(self.prices, self.limit, most, pool)
                continue
            if flow.is_integral and flow.value < self.limit:
                self.found, self.limit = some.placement(flow.x), flow.value * (1 + TOLERANCE)
            if self.is_done or self.bound >= flow.value * (1 - self._gap):
                break
            pool = np.union1d(pool, some.keys[flow.x > PROVEN])
            for step in (1.0, 0.5, 0.25, 0.1):
                trial = self.prices.towards(flow.prices, step)
                others, length = programme.arcs(trial, self.limit, most)
                if step == 1.0:
                    pool = np.union1d(pool, others[others.nearest(MAX_ARCS // 2)].keys)
                if length > self.bound:
                    self.prices, self.bound = trial, length
                    self._follow_paths(WIDTHS[0])
                    break
            else:
                most *= 2
            if self.is_done:
                break
            arcs, _ = programme.arcs(self.prices, self.limit, most, pool)
        return None

    def relax(self, arcs: Arcs) -> bool:
        """Solve the relaxation over all arcs that may matter; return whether that settles it."""
        flow = self._programme.minimise(arcs, self.limit) if len(arcs) else None
        if flow is None or flow.status == INFEASIBLE:
            if flow is not None and self.found:
                raise InfeasiblePlanError(f"no placement: linprog finds no flow from source to sink ({flow.message})")
            self.bound = self.limit
            return True
        length = self._programme.bound_at(flow.prices)
        if length > self.bound:
            self.prices = flow.prices
        self.bound = max(self.bound, length, flow.bound)
        if flow.is_integral:
            is_far = flow.value < self.limit / _FAR
            self.found, self.limit = arcs.placement(flow.x), flow.value * (1 + TOLERANCE)
            if is_far:  # linprog's tolerance was a share of the old limit
                return self.relax(self._programme.arcs(self.prices, self.limit)[0])
        return flow.is_integral

    def branch(self) -> None:
        """Follow more and more paths, until no better one can be left."""
        for width in WIDTHS if self._gap == PROVEN else WIDTHS[:-1]:
            if self.is_done:
                break
            self._follow_paths(width)

    def _follow_paths(self, width: int) -> None:
        """Look for a cheaper placement among the most promising paths; those that were dropped bound what is left."""
        value, placement, bound = self._programme.elementary(self.prices).search(self.limit, width)
        if placement:
            self.found, self.limit = placement, value * (1 + TOLERANCE)
        self.bound = max(self.bound, min(bound, self.limit))

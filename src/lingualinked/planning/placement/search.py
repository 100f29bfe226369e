"""The search for the cheapest placement of a linear programme: few arcs first, all that matter, whole ones.

Knows programmes and their prices; not what the costs stand for.
"""

from __future__ import annotations

import math

import numpy as np

from lingualinked.errors import InfeasiblePlanError, LingualinkedError
from lingualinked.planning.placement.arcs import Arcs
from lingualinked.planning.placement.network import shortest_along
from lingualinked.planning.placement.problem import Placement
from lingualinked.planning.placement.programme import INFEASIBLE, PROVEN, STOPPED, Answer, Flow, Prices, Programme
from lingualinked.planning.placement.tables import TOLERANCE

MAX_ARCS = 6000
"""Arcs that a programme is given at once; the interior point method takes some 0.1 s for as many."""

MAX_ROUNDS = 20
"""Programmes after which prices are as good as they get; four to six are common."""

FIRST_SHARE, GROWTH = 2.5e-3, 1.6
"""Share of the bound by which paths of the first integral programme may be longer, and its factor from one to the next."""

MAX_INTEGRAL_ARCS = 60000
"""Arcs of an integral programme; where a gap is accepted, a twentieth of them, which takes less than a second."""


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
        A placement within the limit, if one is known: returned if nothing better is found in time.
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
        If linprog stops with another status than 0, or ends an integral programme with a fractional flow.
    """
    search = _Search(programme, min(limit, programme.ceiling) * (1 + TOLERANCE), known, gap, prices)
    # 1) prices at which few arcs are left
    arcs = search.price()
    # 2) the relaxation over all of them; 3) whole arcs, where the flow is fractional
    if arcs is None or not search.relax(arcs):
        search.branch()
    bound = limit if not search.found and search.is_done else search.bound
    return Answer(search.found, bound, search.prices)


class _Search:
    """The state of a search for the cheapest placement: the best so far, the limit that it sets, and the bound."""

    def __init__(self, programme: Programme, limit: float, known: Placement, gap: float, prices: Prices | None) -> None:
        self._programme, self._gap = programme, max(gap, PROVEN)
        self.limit, self.found = limit, known
        self.prices = prices or programme.no_prices()
        self.bound = -math.inf
        self._used = np.empty(0, dtype=int)  # keys of arcs that some flow used
        self._is_read = self._gap > PROVEN  # whether the best was read off a flow; with a gap it need not be

    @property
    def is_done(self) -> bool:
        """Whether nothing that is better by more than the gap can be left."""
        return self.bound >= self.limit * (1 - self._gap)

    def price(self) -> Arcs | None:
        """Solve programmes over some of the arcs until their prices leave few, and return those."""
        programme = self._programme
        arcs, self.bound = programme.arcs(self.prices, self.limit)
        most, pool = MAX_ARCS, np.empty(0, dtype=int)
        for _ in range(MAX_ROUNDS):
            if len(arcs) <= most:
                return arcs
            some = arcs[arcs.nearest(most) | np.isin(arcs.keys, pool)]
            flow = programme.minimise(some, self.limit, may_exceed=True)
            if flow.status == INFEASIBLE:  # among equally short paths, no whole one was taken
                most *= 2
                continue
            self._round(some, flow)
            if self.is_done or self.bound >= flow.value * (1 - self._gap):
                break
            self._used = np.union1d(self._used, some.keys[flow.x > PROVEN])
            pool = np.union1d(pool, self._used)
            for step in (1.0, 0.5, 0.25, 0.1):
                trial = self.prices.towards(flow.prices, step)
                others, length = programme.arcs(trial, self.limit)
                if step == 1.0:
                    pool = np.union1d(pool, others[others.nearest(MAX_ARCS // 2)].keys)
                if length > self.bound:
                    self.prices, self.bound, arcs = trial, length, others
                    break
            else:
                arcs, _ = programme.arcs(self.prices, self.limit)
        return None

    def relax(self, arcs: Arcs) -> bool:
        """Solve the relaxation over all arcs that may matter; return whether that settles it."""
        flow = self._programme.minimise(arcs, self.limit) if len(arcs) else None
        if flow is None or flow.status == INFEASIBLE:
            if flow is not None and self.found:
                raise InfeasiblePlanError(f"no placement: linprog finds no flow from source to sink ({flow.message})")
            self.bound = self.limit
            return True
        if flow.is_integral:
            self.found, self.bound = arcs.placement(flow.x), max(self.bound, flow.bound)
            return True
        _, length = self._programme.arcs(flow.prices, self.limit)
        if length > self.bound:
            self.prices, self.bound = flow.prices, length
        self.bound = max(self.bound, flow.bound)
        return False

    def branch(self) -> None:
        """Solve integral programmes over the arcs of longer and longer paths."""
        if self._gap > PROVEN and not self.is_done:
            self._restrict()
        share = FIRST_SHARE
        while not (self.is_done and self._is_read):
            within = min(self.limit, self.bound + share * max(abs(self.bound), self.limit / 100))
            arcs, _ = self._programme.arcs(self.prices, within)
            if len(arcs) > (MAX_INTEGRAL_ARCS if self._gap == PROVEN else MAX_ARCS // 2):
                break
            if not len(arcs):
                self.bound, share = within, share * GROWTH
                if within >= self.limit:
                    break
                continue
            flow = self._programme.minimise(arcs, within, integral=True)
            if len(flow.x) and not flow.is_integral:
                raise LingualinkedError(f"the flow that linprog ends with is not integral ({flow.message})")
            if flow.is_integral:
                self.found, self.limit = arcs.placement(flow.x), min(self.limit, flow.value)
                self._is_read = True
            if flow.status == STOPPED or (flow.status == INFEASIBLE and within >= self.limit):
                self.bound = max(self.bound, within if flow.status == INFEASIBLE else flow.bound)
                break
            self.bound = max(self.bound, min(within, flow.bound))
            share *= GROWTH

    def _accept(self, value: float, placement: Placement) -> bool:
        if not placement or value >= self.limit:
            return False
        self.found, self.limit = placement, value * (1 + TOLERANCE)
        return True

    def _round(self, arcs: Arcs, flow: Flow) -> None:
        """Take an integral flow, or the cheapest placement in the order in which a fractional one has the devices."""
        if flow.is_integral:
            self._is_read |= self._accept(flow.value, arcs.placement(flow.x))
        elif self._programme.order is None:
            value, placement = shortest_along(self._programme.costs, [arcs.order(flow.x)])
            if self._accept(value, placement):
                self._is_read = self._gap > PROVEN

    def _restrict(self) -> None:
        """Solve the integral programme over what the fractional flows used, and the shortest paths."""
        arcs, _ = self._programme.arcs(self.prices, self.limit)
        arcs = arcs[arcs.nearest(MAX_ARCS // 4) | np.isin(arcs.keys, self._used)]
        flow = self._programme.minimise(arcs, self.limit, integral=True)
        if flow.is_integral:
            self._accept(flow.value, arcs.placement(flow.x))

r"""The linear programme that places the layers: one unit of flow from the caller through the devices and back.

Knows costs of spans and hops; not what they stand for, nor where a cap on them comes from.

**Nodes.** :math:`(d, b, \text{in})` and :math:`(d, b, \text{out})` for each device d and boundary :math:`0 \le b \le L`:
d starts at layer b, or has ended before it; a source and a sink, which are the caller.

**Variables.** One flow :math:`x_a \ge 0` on each arc. A *span* leads from :math:`(d, i, \text{in})` to
:math:`(d, j, \text{out})` for :math:`i < j`; it exists where layers :math:`[i, j)` fit into the memory of d, where d is
trusted enough for them, and where a cap allows the time that they take. A *hop* leads from :math:`(d, b, \text{out})` to
:math:`(e, b, \text{in})`, for all pairs of devices or, in a fixed order, to later ones alone. Arcs from the source enter at
layer 0, arcs to the sink leave behind layer L. For each device r that may hold both ends (a *ring*) there is a copy
of all this, in which the flow starts with a first half :math:`f^r_a`, layers :math:`[0, a)` on r, and ends with a second half
:math:`g^r_b`, layers :math:`[b, L)` on r.

**Programme.** With the costs c, the arcs :math:`\delta^\pm(v)` into and out of a node, and the supply s, 1 at the source
and -1 at the sink,

.. math::

    \min \sum_a c_a x_a \quad\text{subject to}\quad
    & \sum_{a \in \delta^+(v)} x_a - \sum_{a \in \delta^-(v)} x_a = s_v \quad \text{for each node } v, \\
    & \sum_{a \text{ a span of } d} x_a + \sum_a f^d_a \le 1 \quad \text{for each device } d, \\
    & \sum_{b < \beta_r(a)} g^r_b \le \sum_{a' < a} f^r_{a'} \quad \text{for each ring } r \text{ and } a,

where :math:`\beta_r(a)` is the first b at which the second half fits beside :math:`[0, a)` into the memory of r and under
the cap. Memory and time grow with a and fall with b, so :math:`\beta_r` does not decrease, and the last rows say exactly
which halves go together. A path goes forward in the layers, so there are no cycles, and each integral solution is one
placement. Its optimum bounds all placements from below; where the optimal flow is integral, it is the plan.

**What is left out, and why that is safe.** At prices :math:`y \ge 0` of the rows for devices and rings, the length of the
shortest path whose spans cost :math:`c_a + y_d` (and halves of rings accordingly), less :math:`\sum_d y_d`, is at most the
cost of any placement: a placement is a path that uses each device at most once. So an arc with no such path through it
up to some limit belongs to no placement that costs at most the limit. Distances without cycles take milliseconds, so
`linprog` is given the arcs that are left under the cost of a placement that is known, first those on the shortest
paths, and its own dual prices tell which ones it lacks [1]_.

**Where the optimal flow is fractional**, paths that use each device once are built stage by stage, under the bounds that the
prices give on whatever a path can go on to [2]_; `elementary` has them. With bounds within some percent of the optimum few paths are
left: on 80 layers and 16 devices, one of them trusted, they prove in 0.01 s what the same matrices with ``integrality=1``
left open by 0.4 % after 8 s.

**Tolerances.** Costs are scaled to about 1, `linprog` keeps rows and reduced costs to 1e-10, and its flow is rounded to a
path whose cost is then summed up anew. Where that cost is far below the scale, the programme is solved again at its scale.
Arcs exist or not, so no tolerance lets a device exceed its memory. A bound within 1e-9 of the value counts as equal to it.

References
----------
.. [1] R. K. Ahuja, T. L. Magnanti, J. B. Orlin, "Network Flows: Theory, Algorithms, and Applications", Prentice Hall,
   1993, chapters 16 (Lagrangian relaxation) and 17.
.. [2] D. Feillet, P. Dejax, M. Gendreau, C. Gueguen, "An exact algorithm for the elementary shortest path problem with
   resource constraints", Networks 44 (2004), 216-229.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, sparse

from lingualinked.errors import LingualinkedError
from lingualinked.planning.placement.arcs import CLOSE, FRONT, SINK, SOURCE, SPAN, Arcs, arcs_within, shortest_length
from lingualinked.planning.placement.elementary import Elementary
from lingualinked.planning.placement.network import Network
from lingualinked.planning.placement.problem import Floats, Ints, Placement
from lingualinked.planning.placement.tables import TOLERANCE, Costs

SIMPLEX_ARCS = 2000
"""From so many arcs on, the interior point method is faster than the dual simplex method: 0.3 s to minutes for 10,000."""

_INTEGRAL = 1e-6  # a flow that is nearer to whole numbers is rounded to a path, whose cost is summed up anew
_FEASIBILITY = 1e-10  # the smallest tolerance that HiGHS accepts
_EXCESS = 10.0  # what a second stage on a device costs, in limits, while arcs are still missing

OPTIMAL, INFEASIBLE = 0, 2
"""Status codes of linprog; 1, too many iterations, and 3, unbounded, can't be, and 4 means numerical difficulties."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """Prices of the rows: float64 ``[D]`` of each device's stages, and ``[D, L+1]`` of the halves of its ring."""

    device: Floats
    ring: Floats

    @property
    def given(self) -> float:
        """By how much the length of a path may exceed what it costs, and what rounding may add to that."""
        total = float(self.device.sum())
        return total + TOLERANCE * (total + float(self.ring.sum()))

    def towards(self, other: Prices, step: float) -> Prices:
        """Return the prices some part of the way to others."""
        return Prices(self.device + step * (other.device - self.device), self.ring + step * (other.ring - self.ring))


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a programme found: a placement or none, what no placement costs less than, and the prices that prove it."""

    placement: Placement
    bound: float
    prices: Prices


@dataclasses.dataclass(frozen=True, slots=True)
class Flow:
    """What linprog found: its status, the flow ``[A]`` if there is one, its cost, order of devices, bound and prices."""

    status: int
    x: Floats
    order: tuple[int, ...]
    value: float
    bound: float
    prices: Prices
    is_integral: bool
    message: str


class Programme:
    """The placements at some additive costs, in any order of devices or in a given one.

    Parameters
    ----------
    costs : Costs
        Of spans and hops.
    order : sequence of int or None
        Devices in pipeline order, any of which may be skipped; ``None``: all devices in any order.
    """

    def __init__(self, costs: Costs, order: Sequence[int] | None = None) -> None:
        self.costs, self.order = costs, order
        self._network = Network.of(costs, order)
        size = self._network.num_layers + 1
        self._least = np.full((len(self._network.ring), size), size)
        for copy, device in enumerate(self._network.ring.tolist()):
            if device >= 0:
                fits = np.isfinite(costs.close[device])
                self._least[copy] = np.where(fits.any(axis=1), fits.argmax(axis=1), size)

    def relaxed(self) -> Flow | None:
        """Return the cheapest flow over all arcs; None if there is none."""
        arcs, _ = self.arcs(self.no_prices(), self._network.ceiling)
        flow = self.minimise(arcs, 1.0) if len(arcs) else None
        return None if flow is None or flow.status == INFEASIBLE else flow

    @property
    def ceiling(self) -> float:
        """What no placement costs more than."""
        return self._network.ceiling

    def no_prices(self) -> Prices:
        """Return prices of zero."""
        return Prices(np.zeros(len(self.costs.enter)), np.zeros(self.costs.front.shape))

    def arcs(
        self, prices: Prices, limit: float, most: int | None = None, pool: Ints | None = None
    ) -> tuple[Arcs, float]:
        """List the arcs on placements that may cost at most a limit, and a bound on what any placement costs.

        Where there are more than ``most``, at least the nearest ones and those with keys in the pool.
        """
        arcs, shortest = arcs_within(self._network, self._priced(prices), limit + prices.given, most, pool)
        return arcs, shortest - prices.given

    def bound_at(self, prices: Prices) -> float:
        """Return a bound on what any placement costs."""
        return shortest_length(self._priced(prices)) - prices.given

    def elementary(self, prices: Prices, ranked: Programme | None = None) -> Elementary:
        """Return the search for a path that uses each device once, guided by prices; of least cost, or of least other."""
        programmes = [self] if ranked is None else [self, ranked]
        networks = [programme._network for programme in programmes]  # noqa: SLF001 - of the same class
        closes = [programme.costs.close for programme in programmes]
        return Elementary(networks, closes, self._priced(prices), prices.device, prices.given)

    def _priced(self, prices: Prices) -> Network:
        """Add to what arcs cost the prices of the rows that they are in."""
        ring = np.where(self._network.ring[:, None] < 0, 0.0, prices.ring[self._network.ring])
        later = ring[:, ::-1].cumsum(axis=1)[:, ::-1] - ring
        layers = np.arange(self._least.shape[1])
        close = ((self._least[:, None, :] > layers[:, None]) * ring[:, None, :]).sum(axis=2)
        return self._network.priced(prices.device, -later, close)

    def minimise(self, arcs: Arcs, scale: float, *, may_exceed: bool = False) -> Flow:
        """Solve the programme over some arcs, at costs of about a scale; devices may have two stages, at a cost."""
        scale = scale or self._network.ceiling
        # 1) the flow is kept at every node
        num_arcs, num_devices = len(arcs), self._network.enter.shape[1]
        nodes, ends = np.unique(np.concatenate([arcs.tail, arcs.head]), return_inverse=True)
        columns = np.tile(np.arange(num_arcs), 2)
        flow = sparse.csr_matrix((np.repeat([1.0, -1.0], num_arcs), (ends, columns)), (len(nodes), num_arcs))
        supply = (nodes == SOURCE).astype(float) - (nodes == SINK)
        # 2) one stage on each device, and halves of rings that go together
        stages = np.flatnonzero((arcs.kind == SPAN) | (arcs.kind == FRONT))
        rows = [(arcs.device[stages], stages, np.ones(len(stages)))]
        most = [1.0] * num_devices
        ring_rows = []
        for copy in np.flatnonzero(self._network.ring >= 0):
            fronts = np.flatnonzero((arcs.kind == FRONT) & (arcs.copy == copy))
            closes = np.flatnonzero((arcs.kind == CLOSE) & (arcs.copy == copy))
            ends_of = np.unique(arcs.end[fronts])
            for end in ends_of[np.diff(self._least[copy, ends_of], prepend=0) > 0]:
                early = closes[arcs.start[closes] < self._least[copy, end]]
                before = fronts[arcs.end[fronts] < end]
                if len(early):
                    both = np.concatenate([early, before])
                    signs = np.repeat([1.0, -1.0], [len(early), len(before)])
                    rows.append((np.full(len(both), len(most)), both, signs))
                    most.append(0.0)
                    ring_rows.append((self._network.ring[copy], end))
        cost = arcs.costs_in(self._network) / scale
        num_columns = num_arcs
        if may_exceed:
            extra = np.arange(num_devices)
            rows.append((extra, num_arcs + extra, -np.ones(num_devices)))
            cost = np.concatenate([cost, np.full(num_devices, _EXCESS)])
            num_columns += num_devices
            flow = sparse.hstack([flow, sparse.csr_matrix((len(nodes), num_devices))], format="csr")
        row, column, entries = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        upper = sparse.csr_matrix((entries, (row, column)), (len(most), num_columns))
        # 3) the answer
        result = _linprog(cost, upper, np.array(most), flow, supply)
        x = np.empty(0) if result.x is None else result.x
        is_integral = len(x) > 0 and float(np.abs(x - x.round()).max()) < _INTEGRAL
        is_integral = is_integral and not x[num_arcs:].max(initial=0.0) > _INTEGRAL
        x, cost = x[:num_arcs], cost[:num_arcs]
        prices = self.no_prices()
        if result.status == OPTIMAL:
            dual = np.maximum(-result.ineqlin.marginals, 0.0) * scale
            prices.device[:] = dual[:num_devices]
            for row_of, price in zip(ring_rows, dual[num_devices:], strict=False):
                prices.ring[row_of] = price
        bound = math.inf if result.fun is None else (float(result.fun) - _FEASIBILITY) * scale
        return Flow(
            status=result.status,
            x=x,
            order=arcs.order(x) if len(x) else (),
            value=float(cost[x > 0.5].sum()) * scale if is_integral else bound,
            bound=bound,
            prices=prices,
            is_integral=is_integral,
            message=str(result.message),
        )


def _linprog(cost: Floats, upper: Any, most: Floats, equal: Any, supply: Floats) -> Any:
    """Call linprog; where one method meets numerical difficulties, another one is tried."""
    options = {"primal_feasibility_tolerance": _FEASIBILITY, "dual_feasibility_tolerance": _FEASIBILITY}
    call: Any = optimize.linprog  # looked up on each call, so that a test can take its place
    for method in ["highs-ds", "highs-ipm"] if len(cost) < SIMPLEX_ARCS else ["highs-ipm", "highs-ds"]:
        result = call(cost, A_ub=upper, b_ub=most, A_eq=equal, b_eq=supply, method=method, options=options)
        if result.status in (OPTIMAL, INFEASIBLE):
            return result
    raise LingualinkedError(
        f"linprog stopped with status {result.status} ({result.message}) on {len(cost)} arcs; "
        "check the profile for costs that differ by more than ten orders of magnitude"
    )

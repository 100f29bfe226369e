"""Solve a placement problem: which device holds which layers, and how far from the best that can be.

Knows problems in numbers, the linear programme and its caps; no model, no profile and no process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import numpy as np

from lingualinked.errors import ArgumentError
from lingualinked.planning.placement.infeasible import explain_infeasible
from lingualinked.planning.placement.network import shortest_along
from lingualinked.planning.placement.problem import (
    Floats,
    Placement,
    Problem,
    Solution,
    energy_j,
    interval_s,
    latency_s,
)
from lingualinked.planning.placement.programme import PROVEN, Answer, Programme
from lingualinked.planning.placement.search import cheapest
from lingualinked.planning.placement.symmetry import in_listed_order
from lingualinked.planning.placement.tables import (
    TOLERANCE,
    Costs,
    SpanTables,
    bottleneck_costs,
    excess_costs,
    sum_costs,
)
from lingualinked.workload import Objective

STRICTLY = 1e-11
"""Relative. A bottleneck within this share of an interval counts as equal to it."""

EXACT_SIZE = 1536
"""Devices times layers up to which no gap is accepted; 16 devices hold 80 layers in seconds."""

TIES_SIZE = 256
"""Devices times layers up to which ties in throughput are broken over all orders; beyond, along the order found."""

LARGE_GAP = 0.01
"""Share of the value at which the search ends for more; it may end with a larger one, which is stated."""


def solve_problem(
    problem: Problem,
    objective: Objective = "throughput",
    *,
    order: Sequence[int] | None = None,
    max_bottleneck_s: float | None = None,
) -> Solution:
    r"""Place contiguous layer ranges on devices so that an objective is least.

    Parameters
    ----------
    problem : Problem
        D devices and L layers, in seconds, bytes and watts.
    objective : {"throughput", "latency", "energy"}
        What is minimised: the seconds between two steps with the problem's sessions in flight, which is the larger of
        the seconds of a mean step in which the busiest device or link is busy and of the latency per session; the
        latency, which is the seconds of a step from the caller through all stages and back; the joules of a step. Ties
        go to the lower latency.
    order : sequence of int, optional
        Devices in pipeline order; any of them may be skipped, and those that are missing are not used. In a ring the
        closing device is the first one in use. None: any devices in any order.
    max_bottleneck_s : float, optional
        The most seconds of a mean step that a device or link may be busy. None: no limit.

    Returns
    -------
    Solution
        Placement, value and proven lower bound.

    Raises
    ------
    InfeasiblePlanError
        If there is no placement; the message says how many bytes are missing and on which device, or which permission
        or limit prevents it.
    ArgumentError
        If the objective is not one of the three, the order is empty or names a device twice or one that is not there,
        the limit is not positive, or energy is asked for and a device's power is not known.
    LingualinkedError
        If linprog stops with a status that it can't have; see `programme`.

    Notes
    -----
    One programme, `programme.Programme`, serves all objectives; its solution is the placement, its optimum the bound.

    **Latency and energy** are sums over spans and hops, which are the costs of its arcs. Among placements of the same
    energy, a second one finds the lowest latency with the first one's costs as a row.

    **The bottleneck** B is a cap: only spans and links remain that are busy for at most T seconds, and B is the least T
    for which there is a placement, T being one of the finitely many times that a span or link takes. Below B the
    relaxation itself is infeasible, as a rule, so that `linprog` proves the value; the placement is the one of least
    latency within the cap. Where only existence is asked, spans that could go on are left out
    (`arcs.Arcs.without_dominated`), and hops cost nothing.

    **The interval** with S sessions in flight is :math:`\\max(B, \\text{latency} / S)`. The least latency
    :math:`l(T)` within a cap T falls as T rises. For any T, a placement has a bottleneck above T or takes at least
    :math:`l(T) / S`; so each programme halves the caps at which a better one can be, and the last one proves the value.

    **Upper bounds** that the programme starts from come from a dynamic programme along some orders of devices,
    `network.shortest_along`, which also finds the bottleneck in a fixed order: there it is exact [1]_ [2]_.

    LinguaLinked [3]_ minimises the sum of costs; that is the latency here, which never rewards that stages work at the
    same time.

    References
    ----------
    .. [1] S. H. Bokhari, "Partitioning problems in parallel, pipelined, and distributed computing", IEEE Trans.
       Computers 37 (1988), 48-57.
    .. [2] A. Pinar, C. Aykanat, "Fast optimal load balancing algorithms for 1D partitioning", J. Parallel Distrib.
       Comput. 64 (2004), 974-996.
    .. [3] J. Zhao et al., "LinguaLinked: A Distributed Large Language Model Inference System for Mobile Devices",
       arXiv:2312.00388, 2023.
    """
    devices = _checked(problem, objective, order, max_bottleneck_s)
    solver = _Solver(problem, order, math.inf if max_bottleneck_s is None else max_bottleneck_s)
    value_of = {"throughput": interval_s, "latency": latency_s, "energy": energy_j}[objective]
    if objective == "throughput":
        placement, bound = solver.least_interval()
    else:
        placement, bound = solver.least_sum(problem.watts if objective == "energy" else None)
    if not placement:
        raise explain_infeasible(problem, devices, solver.limit, solver.closest)
    if order is None:
        placement = in_listed_order(problem, placement)
    value = value_of(problem, placement)
    return Solution(
        placement=placement, value=value, lower_bound=value if bound >= value * (1 - 10 * PROVEN) else bound
    )


def _checked(
    problem: Problem, objective: Objective, order: Sequence[int] | None, max_bottleneck_s: float | None
) -> tuple[int, ...]:
    """Check the arguments; return the devices that may be used."""
    if objective not in get_args(Objective):
        raise ArgumentError(f"objective={objective!r} must be one of {', '.join(map(repr, get_args(Objective)))}")
    if max_bottleneck_s is not None and not max_bottleneck_s > 0:
        raise ArgumentError(f"max_bottleneck_s={max_bottleneck_s!r} must be a positive number of seconds")
    devices = tuple(range(problem.num_devices)) if order is None else tuple(order)
    if not devices or len(set(devices)) < len(devices) or not set(devices) <= set(range(problem.num_devices)):
        raise ArgumentError(f"order={order!r} must name devices 0 to {problem.num_devices - 1}, each at most once")
    unknown = [problem.names[device] for device in devices if not np.isfinite(problem.watts[device])]
    if objective == "energy" and unknown:
        raise ArgumentError(
            f"energy needs the power of every device; give the watts of {', '.join(map(repr, unknown))}"
        )
    return devices


class _Solver:
    def __init__(self, problem: Problem, order: Sequence[int] | None, limit: float) -> None:
        self.problem, self.order, self.limit = problem, order, limit
        self.gap = 0.0 if problem.num_devices * problem.num_layers <= EXACT_SIZE else LARGE_GAP
        self.tables = SpanTables.of(problem)
        self.busy = bottleneck_costs(problem, self.tables)
        if math.isfinite(limit):
            self.busy = self.busy.at_most(limit)
        self.orders = [tuple(order)] if order is not None else list(_orders(problem))

    def within(self, cap: float) -> Costs:
        return sum_costs(self.problem, self.busy.at_most(cap), self.tables)

    def least_sum(self, watts: Floats | None) -> tuple[Placement, float]:
        costs = sum_costs(self.problem, self.busy, self.tables, watts=watts)
        programme = Programme(costs, self.order)
        limit, known = shortest_along(costs, self.orders)
        answer = cheapest(programme, limit, known, gap=self.gap)
        placement = answer.placement
        if placement and watts is not None:
            seconds = Programme(sum_costs(self.problem, self.busy, self.tables), self.order)
            value = energy_j(self.problem, placement)
            tied = programme.tied(value, answer.prices, seconds)
            if (
                tied
                and energy_j(self.problem, tied) <= value * (1 + TOLERANCE)
                and latency_s(self.problem, tied) < latency_s(self.problem, placement)
            ):
                placement = tied
        return placement, answer.bound

    def least_maximum(self, costs: Costs, best_within: Callable[[float, Placement], Answer]) -> tuple[Placement, float]:
        """Return the placement whose costliest part costs least, and a proven lower bound on that.

        Parameters
        ----------
        costs : Costs
            Of which the largest counts.
        best_within : callable
            From a cap on them to a placement within it that is best in another respect.
        """
        value, known = shortest_along(costs, self.orders, np.maximum)
        if self.order is not None:
            return (best_within(value, known).placement, value) if known else ((), math.inf)
        caps = _caps(costs, value)
        # 1) the least cap within which the relaxation has a solution, seeking from the best known downwards
        low, high, step = 0, len(caps), 1
        while low < high:
            probe = max(low, high - step) if low == 0 else (low + high) // 2
            fits, along = Programme(costs.at_most(caps[probe]).of_stages(), self.order).fit()
            least, placement = shortest_along(costs, [along], np.maximum) if fits else (math.inf, ())
            if least < value:
                known, value = placement, least
                probe = min(probe, int(np.searchsorted(caps, value * (1 - TOLERANCE))))
            if fits:
                high, step = probe, step * 4
            else:
                low = probe + 1
        # 2) from there on the least cap within which there is a placement
        bound, high, step = value, int(np.searchsorted(caps, value * (1 - TOLERANCE))), 1
        while low < high:
            probe = min(low + step - 1, (low + high) // 2)
            answer = Programme(costs.at_most(caps[probe]).of_stages(), self.order).any_placement()
            if answer.bound == -math.inf:
                answer = best_within(float(caps[probe]), ())
            if answer.placement:
                known, value = answer.placement, costs.costliest(answer.placement)
                high = min(probe, int(np.searchsorted(caps, value * (1 - TOLERANCE))))
            elif math.isinf(answer.bound):
                low, step = probe + 1, step * 2
            else:
                bound = float(caps[low])
                break
        return (best_within(value, known).placement, min(bound, value)) if known else ((), math.inf)

    def least_interval(self) -> tuple[Placement, float]:
        sessions = self.problem.num_sessions
        if math.isinf(sessions):
            return self.least_maximum(self.busy, self.quickest)
        costs = self.within(math.inf)
        limit, known = shortest_along(costs, self.orders)
        answer = cheapest(Programme(costs, self.order), limit, known, gap=self.gap)
        if not answer.placement:
            return (), math.inf
        found, bound = answer.placement, answer.bound / sessions
        value = interval_s(self.problem, found)
        if value > bound * (1 + PROVEN):
            _, other = shortest_along(self.busy, self.orders, np.maximum)
            if other and interval_s(self.problem, other) < value:
                found, value = other, interval_s(self.problem, other)
        caps = _caps(self.busy, value)
        # a placement may be busy for less than the bound: the last cap below it counts
        low, high = max(0, int(np.searchsorted(caps, bound * (1 - TOLERANCE))) - 1), len(caps)
        prices, least_latency, open_bound = answer.prices, answer.bound, math.inf
        is_first = True
        while low < high and min(open_bound, caps[low]) < value * (1 - 2 * self.gap):
            probe = high - 1 if is_first else (low + high) // 2
            is_first = False
            costs = self.within(caps[probe])
            answer = cheapest(
                Programme(costs, self.order), value * sessions * (1 - STRICTLY), prices=prices, gap=self.gap
            )
            prices = answer.prices
            if answer.placement and interval_s(self.problem, answer.placement) < value:
                found, value = answer.placement, interval_s(self.problem, answer.placement)
            least = min(answer.bound / sessions, value)
            if least < value * (1 - PROVEN) and least > caps[probe]:
                open_bound = min(open_bound, least)
            if least > caps[probe]:
                low = probe + 1
            else:
                high = probe
            high = min(high, int(np.searchsorted(caps, value * (1 - TOLERANCE))))
        if latency_s(self.problem, found) > least_latency * (1 + PROVEN):
            found = self.quickest(value, found).placement
        return found, min(value, open_bound, caps[low] if low < high else value)

    def quickest(self, cap: float, known: Placement = ()) -> Answer:
        limit, order = latency_s(self.problem, known) if known else math.inf, self.order
        if known and self.problem.num_devices * self.problem.num_layers > TIES_SIZE:
            order = tuple(dict.fromkeys(span.device for span in known))
        return cheapest(Programme(self.within(cap), order), limit, known, gap=self.gap)

    def closest(self) -> tuple[Placement, float]:
        costs = excess_costs(self.problem, self.tables)

        def any_within(cap: float, known: Placement) -> Answer:
            limit = float(len(known) or math.inf)
            return cheapest(Programme(costs.at_most(cap).of_stages(), self.order), limit, known)

        placement, _ = self.least_maximum(costs, any_within)
        return placement, costs.costliest(placement) if placement else math.inf


def fits(problem: Problem) -> bool:
    """Say whether there is a placement at all, however slow."""
    costs, orders = excess_costs(problem, SpanTables.of(problem)), list(_orders(problem))
    if shortest_along(costs, orders, np.maximum)[0] == 0:
        return True
    programme = Programme(costs.at_most(0.0).of_stages())
    return programme.fit()[0] and bool(cheapest(programme, math.inf).placement)


def _caps(costs: Costs, below: float) -> Floats:
    """List the costs of all parts, those below a value."""
    parts = (costs.span, costs.hop, costs.enter, costs.leave, *costs.close.values())
    values = np.unique(np.concatenate([part.ravel() for part in parts]))
    return values[values < min(below * (1 - STRICTLY), math.inf)]


def _orders(problem: Problem) -> Iterator[tuple[int, ...]]:
    devices = range(problem.num_devices)
    if len(devices) <= 4:
        yield from itertools.permutations(devices)
        return
    speed = problem.layer_s.sum(axis=1)
    for key in (None, speed, -speed, -problem.capacity_bytes, speed / problem.capacity_bytes):
        order = list(devices) if key is None else np.argsort(key, kind="stable").tolist()
        firsts = [device for device in order if problem.may_be_first[device]] or order
        lasts = [device for device in order if problem.may_be_last[device]] or order
        last = next((device for device in lasts if device != firsts[0]), lasts[-1])
        yield tuple(dict.fromkeys([firsts[0], *(device for device in order if device != last), last]))

"""Solve a placement problem: which device holds which layers, and how far from the best that can be.

Knows problems in numbers, the linear programme and its caps; no model, no profile and no process.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np

from lingualinked.errors import ArgumentError
from lingualinked.planning.placement.infeasible import explain_infeasible
from lingualinked.planning.placement.makers import branch_over_makers
from lingualinked.planning.placement.network import shortest_along
from lingualinked.planning.placement.problem import (
    Floats,
    Placement,
    Problem,
    Solution,
    bottleneck_s,
    energy_j,
    interval_s,
    latency_s,
)
from lingualinked.planning.placement.programme import Answer, Programme
from lingualinked.planning.placement.search import WIDTHS, cheapest
from lingualinked.planning.placement.sweep import STRICTLY, sweep_caps
from lingualinked.planning.placement.symmetry import in_listed_order
from lingualinked.planning.placement.tables import (
    PROVEN,
    TOLERANCE,
    Costs,
    SpanTables,
    bottleneck_costs,
    excess_costs,
    sum_costs,
)
from lingualinked.workload import Objective

EXACT_SIZE = 1536
"""Devices times layers up to which no gap is accepted in free order; 16 devices hold 80 layers in seconds."""

TIES_SIZE = 256
"""Devices times layers up to which ties are broken over all placements; beyond, among those that are soon found."""

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
    Where its optimal flow is fractional, its prices guide a search for the best whole path, `elementary.Elementary`.

    **Latency and energy** are sums over spans and hops, which are the costs of its arcs. Among placements of the same
    energy, the same prices guide a search for the one of lowest latency.

    **The bottleneck** B is a cap: only spans and links remain that are busy for at most T seconds, and B is the least T
    for which there is a placement, T being one of the finitely many times that a span or link takes. Below B the
    relaxation itself is infeasible, as a rule, so that `linprog` proves the value; the placement is the one of least
    latency within the cap. Where only existence is asked, spans that could go on are left out
    (`tables.Costs.of_stages`), and hops cost nothing.

    **The interval** with S sessions in flight is :math:`\\max(B, \\text{latency} / S)`. The least latency
    :math:`l(T)` within a cap T falls as T rises. For any T, a placement has a bottleneck above T or takes at least
    :math:`l(T) / S`; so each programme halves the caps at which a better one can be, and the last one proves the value
    (`sweep.sweep_caps`).

    **Upper bounds** that the programme starts from come from a dynamic programme along some orders of devices,
    `network.shortest_along` [1]_ [2]_.

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
    if problem.shortcuts is None:
        placement, bound = solver.least(objective)
    else:
        placement, bound = branch_over_makers(
            problem,
            lambda part: _Solver(part, order, solver.limit).least(objective),
            lambda found: value_of(problem, found) if _within(problem, found, solver.limit) else math.inf,
            gap=0.0 if solver.is_small else LARGE_GAP,
        )
        placement = placement if _within(problem, placement, solver.limit) else ()
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


def _within(problem: Problem, placement: Placement, limit: float) -> bool:
    """Return whether a placement keeps to a limit on the bottleneck; true of none."""
    return math.isinf(limit) or not placement or bottleneck_s(problem, placement) <= limit * (1 + TOLERANCE)


class _Solver:
    def __init__(self, problem: Problem, order: Sequence[int] | None, limit: float) -> None:
        self.problem, self.order, self.limit = problem, order, limit
        is_exact = order is not None or problem.num_devices * problem.num_layers <= EXACT_SIZE
        self.gap = 0.0 if is_exact else LARGE_GAP
        self.is_small = problem.num_devices * problem.num_layers <= TIES_SIZE
        self.tables = SpanTables.of(problem)
        self.busy = bottleneck_costs(problem, self.tables)
        if math.isfinite(limit):
            self.busy = self.busy.at_most(limit)
        self.orders = [tuple(order)] if order is not None else list(_orders(problem))

    def least(self, objective: Objective) -> tuple[Placement, float]:
        """Return the placement of least value, and a proven lower bound on that."""
        if objective == "throughput":
            return self.least_interval()
        return self.least_sum(self.problem.watts if objective == "energy" else None)

    def least_sum(self, watts: Floats | None) -> tuple[Placement, float]:
        """Return the placement of least latency or energy, and a proven lower bound on that."""
        answer = self._cheapest(watts)
        if not answer.placement or watts is None:
            return answer.placement, answer.bound
        costs, seconds = (
            Programme(sum_costs(self.problem, self.busy, self.tables, watts=each), self.order) for each in (watts, None)
        )
        value = energy_j(self.problem, answer.placement)
        search, tied = costs.elementary(answer.prices, seconds), answer.placement
        for width in WIDTHS if self.is_small else WIDTHS[:-1]:
            least_s, tied, bound = search.search(value * (1 + TOLERANCE), width)
            if bound >= least_s:
                break
        is_better = (
            tied
            and energy_j(self.problem, tied) <= value * (1 + TOLERANCE)
            and latency_s(self.problem, tied) < latency_s(self.problem, answer.placement)
        )
        return tied if is_better else answer.placement, answer.bound

    def least_interval(self) -> tuple[Placement, float]:
        """Return the placement of least interval, of those the one of least latency, and a proven lower bound."""
        sessions, problem = self.problem.num_sessions, self.problem
        interval = functools.partial(interval_s, problem)
        _, known = shortest_along(self.busy, self.orders, np.maximum)
        # 1) the least latency is a bound, unless sessions without end hide it
        least_s, prices = 0.0, None
        if math.isfinite(sessions):
            fastest = self._cheapest(None)
            least_s, prices = fastest.bound, fastest.prices
            known = min((each for each in (fastest.placement, known) if each), key=interval, default=())

        # 2) caps on the bottleneck, within which the latency is least
        def quicker(cap: float, value: float) -> tuple[Placement, float]:
            nonlocal prices
            if math.isinf(sessions):
                return self._any_within(self.busy, cap)
            programme, limit = Programme(self._seconds(cap), self.order), value * sessions * (1 - STRICTLY)
            answer = cheapest(programme, limit, prices=prices, gap=self.gap)
            prices = answer.prices
            return answer.placement, answer.bound / sessions

        gap = self.gap if math.isfinite(sessions) else 0.0  # a programme that asks only for existence is soon solved
        found, bound = sweep_caps(self.busy, known, interval, quicker, bound=least_s / sessions, gap=gap)
        # 3) of placements that are as good, the quickest one
        if found and latency_s(problem, found) > least_s * (1 + PROVEN):
            order = self.order if self.is_small or self.order else tuple(dict.fromkeys(span.device for span in found))
            programme = Programme(self._seconds(interval(found)), order)
            found = cheapest(programme, latency_s(problem, found), found, gap=self.gap).placement
        return found, bound

    @property
    def has_placement(self) -> bool:
        """Whether memory allows any."""
        costs = excess_costs(self.problem, self.tables)
        return shortest_along(costs, self.orders, np.maximum)[0] == 0 or bool(self._any_within(costs, 0.0)[0])

    def closest(self) -> tuple[Placement, float]:
        """Return the placement that exceeds memory by least, and by how many bytes at most on one device."""
        costs = excess_costs(self.problem, self.tables)
        _, known = shortest_along(costs, self.orders, np.maximum)
        found, _ = sweep_caps(costs, known, costs.costliest, lambda cap, _: self._any_within(costs, cap))
        return found, costs.costliest(found) if found else math.inf

    def _seconds(self, cap: float) -> Costs:
        return sum_costs(self.problem, self.busy.at_most(cap), self.tables)

    def _cheapest(self, watts: Floats | None) -> Answer:
        costs = sum_costs(self.problem, self.busy, self.tables, watts=watts)
        limit, known = shortest_along(costs, self.orders)
        return cheapest(Programme(costs, self.order), limit, known, gap=self.gap)

    def _any_within(self, costs: Costs, cap: float) -> tuple[Placement, float]:
        """Find a placement whose parts cost no more than a cap; infinity follows where there is none, or 0."""
        allowed = costs.at_most(cap)
        programme = Programme(allowed.of_stages(), self.order)
        # 1) as if any two devices had a link: then few spans matter
        flow = Programme(allowed.with_every_hop().of_stages(), self.order).relaxed()
        if flow is None:
            return (), math.inf
        # 2) the order of devices in the flow, and paths along its prices
        value, placement = shortest_along(costs, [flow.order], np.maximum)
        if value <= cap * (1 + TOLERANCE):
            return placement, 0.0
        for width in WIDTHS if self.gap == 0 else WIDTHS[:-1]:
            _, placement, bound = programme.elementary(flow.prices).search(programme.ceiling, width)
            if placement or bound >= programme.ceiling:
                return placement, 0.0 if placement else math.inf
        # 3) the links that there are
        is_possible = self.gap > 0 or programme.relaxed() is not None
        return (), 0.0 if is_possible else math.inf


def fits(problem: Problem) -> bool:
    """Say whether there is a placement at all, however slow."""
    return _Solver(problem, None, math.inf).has_placement


def _orders(problem: Problem) -> Iterator[tuple[int, ...]]:
    devices = range(problem.num_devices)
    if len(devices) <= 4:
        yield from itertools.permutations(devices)
        return
    speed = problem.layer_s.sum(axis=1)
    for key in (None, speed, -speed, -problem.capacity_bytes, speed / np.maximum(problem.capacity_bytes, 1)):
        order = list(devices) if key is None else np.argsort(key, kind="stable").tolist()
        firsts = [device for device in order if problem.may_be_first[device]] or order
        lasts = [device for device in order if problem.may_be_last[device]] or order
        last = next((device for device in lasts if device != firsts[0]), lasts[-1])
        yield tuple(dict.fromkeys([firsts[0], *(device for device in order if device != last), last]))

"""Solve a placement problem: which device holds which layers, and how far from the best that can be.

Knows problems in numbers and the searches for them; no model, no profile and no process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from lingualinked.errors import ArgumentError
from lingualinked.planning.placement.costs import Costs, bottleneck_costs, energy_costs, latency_costs
from lingualinked.planning.placement.infeasible import explain_infeasible
from lingualinked.planning.placement.interval import search_interval
from lingualinked.planning.placement.network import Network
from lingualinked.planning.placement.orders import Route, best_along, rings_within
from lingualinked.planning.placement.problem import (
    Placement,
    Problem,
    Solution,
    bottleneck_s,
    energy_j,
    interval_s,
    latency_s,
)
from lingualinked.planning.placement.programme import solve_programme, tight_networks
from lingualinked.planning.placement.relaxation import relaxation_value
from lingualinked.planning.placement.search import search_bottleneck, search_sum
from lingualinked.planning.placement.spans import TOLERANCE, SpanTables
from lingualinked.planning.placement.subsets import best_of_subsets, work_of
from lingualinked.planning.placement.symmetry import in_listed_order
from lingualinked.workload import Objective, check_objective

Search: TypeAlias = Callable[[Costs], Route | None]

MAX_WORK = 1.2e8
"""Additions up to which all orders are searched: less than a second."""

MAX_SEARCHES = 8
"""For the least latency of many devices in any order, within one cap each: half a second for 80 layers on 16."""

LATENCY_PRICE = 1e-10
"""Of the energy: what the whole latency of a placement costs where it only breaks ties."""


def solve_problem(
    problem: Problem,
    objective: Objective = "throughput",
    *,
    order: Sequence[int] | None = None,
    max_bottleneck_s: float | None = None,
) -> Solution:
    """Place contiguous layer ranges on devices so that an objective is least.

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
        Placement, value, proven lower bound, and value of the linear relaxation.

    Raises
    ------
    InfeasiblePlanError
        If there is no placement; the message says how many bytes are missing and on which device, or which permission,
        link or limit prevents it.
    ArgumentError
        If the objective is not one of the three, the order is empty or names a device twice or one that is not there,
        the limit is not positive, or energy is asked for and a device's power is not known.
    LingualinkedError
        If linprog stops with a status that a shortest path can't have; see Notes.

    Notes
    -----
    **Variables.** For an order of devices, the nodes of a layered acyclic network are ``in(d, i)`` (device d starts at
    layer i) and ``out(d, j)`` (it has ended before layer j). Its arcs are spans ``in(d, i) -> out(d, j)`` with ``i < j``,
    hops ``out(d, i) -> in(e, i)`` to later devices, and those from and to the caller. One variable ``x_a >= 0`` per arc
    is the flow on it.

    **Constraints.** One unit of flow leaves the caller, returns to it, and is kept at every node: ``N x = b``. Memory
    (bytes), permissions, missing links and the bottleneck (seconds) are properties of single arcs, and decide which
    exist. A ring, whose first and last stage share one device's memory and time, has one network per first half
    ``[0, a)``, in which the second halves that exist are those that fit beside it.

    **Objective.** ``sum_a c_a x_a`` in seconds (latency) or joules (energy). For throughput the least interval
    ``T*`` is found first. A full pipeline's is the least bottleneck, by the same shortest-path recursion over (min,
    max) instead of (min, +): exact, no bisection to a tolerance [2]_ [3]_. With S sessions it is the least of
    ``max(bottleneck, latency / S)``, by least latencies within caps on the bottleneck (see `interval.search_interval`);
    one session's is the least latency. The programme then has the arcs that are busy for at most ``T*`` and minimises
    latency.

    **Why the solution is integral.** N has one 1 and one -1 per column, so it is totally unimodular and every vertex
    of ``{x >= 0, N x = b}`` is integral [1]_. The dual simplex method of HiGHS ends in a vertex; its path is the
    placement.

    **Status codes of linprog.** 0: solved. 2, infeasible: `InfeasiblePlanError`. 1 (limit), 3 (unbounded), 4 (numerical
    difficulties): `LingualinkedError`. Branch and bound for a lower bound may stop at its time limit (1): the bound
    proven by then is used.

    **Orders.** Where the order is free and devices are few, a programme over subsets of devices covers all orders, and
    the solution is optimal: ``lower_bound == value``. For more, orders come from a beam search, and
    `Solution.lower_bound` tells how much could be left; ties are then broken along the order found. LinguaLinked [4]_
    minimises the sum of costs; that is the latency here, which never rewards that
    stages work at the same time.

    References
    ----------
    .. [1] R. K. Ahuja, T. L. Magnanti, J. B. Orlin, "Network Flows: Theory, Algorithms, and Applications", Prentice
       Hall, 1993.
    .. [2] S. H. Bokhari, "Partitioning problems in parallel, pipelined, and distributed computing", IEEE Trans.
       Computers 37 (1988), 48-57.
    .. [3] A. Pinar, C. Aykanat, "Fast optimal load balancing algorithms for 1D partitioning", J. Parallel Distrib.
       Comput. 64 (2004), 974-996.
    .. [4] J. Zhao et al., "LinguaLinked: A Distributed Large Language Model Inference System for Mobile Devices",
       arXiv:2312.00388, 2023.
    """
    devices = _checked(problem, objective, order, max_bottleneck_s)
    limit = math.inf if max_bottleneck_s is None else max_bottleneck_s
    tables = SpanTables.of(problem)
    costs = _costs(problem, tables, objective, limit)
    exact, bound = _exact_search(problem, devices, fixed=order is not None), 0.0
    if objective == "throughput" and math.isfinite(problem.num_sessions):
        route, bound = _search_interval(problem, tables, devices, limit, exact)
    elif exact is not None:
        route = exact(costs)
    else:
        route, bound = _search(problem, tables, costs, devices, limit)
    if route is None or (
        costs.combine is np.maximum and bottleneck_s(problem, route.placement) > limit * (1 + TOLERANCE)
    ):
        raise explain_infeasible(
            problem, tables, devices, limit, exact or (lambda other: search_bottleneck(other, devices)[0])
        )
    along = tuple(order) if order is not None else None
    placement = _decide(problem, tables, objective, limit, route, exact, along)
    if along is None:
        placement = in_listed_order(problem, placement)
    value = {"throughput": interval_s, "latency": latency_s, "energy": energy_j}[objective](problem, placement)
    relaxation = min(value, relaxation_value(problem, objective, devices, limit))
    if exact is not None:
        bound = value
    elif not bound:
        bound = relaxation_value(problem, objective, devices, limit, integral=True)
    return Solution(
        placement=placement, value=value, lower_bound=min(value, max(bound, relaxation)), relaxation=relaxation
    )


def _checked(
    problem: Problem, objective: Objective, order: Sequence[int] | None, max_bottleneck_s: float | None
) -> tuple[int, ...]:
    """Check the arguments; give the devices that may be used."""
    check_objective(objective)
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


def _costs(problem: Problem, tables: SpanTables, objective: Objective, limit: float) -> Costs:
    if objective == "throughput":
        return bottleneck_costs(problem, tables)
    return (latency_costs if objective == "latency" else energy_costs)(problem, tables, limit)


def _exact_search(problem: Problem, devices: Sequence[int], *, fixed: bool) -> Search | None:
    """Give the search that finds the optimum: always along a fixed order, for few devices in any."""
    if fixed:
        return lambda costs: best_along(costs, devices)
    closers = int((problem.may_close & problem.may_be_first & problem.may_be_last)[list(devices)].sum())
    halves = 1 + closers * (problem.num_layers - 1) / 2  # half the subsets leave a device out
    if work_of(len(devices), problem.num_layers) * halves > MAX_WORK:
        return None
    return lambda costs: best_of_subsets(costs, devices)


def _search(
    problem: Problem, tables: SpanTables, costs: Costs, devices: Sequence[int], limit: float
) -> tuple[Route | None, float]:
    """Search the orders of many devices; a proven lower bound comes along, 0 if there is none."""
    if costs.combine is np.maximum:
        return search_bottleneck(costs, devices)
    start = search_bottleneck(bottleneck_costs(problem, tables), devices)[0]
    if start is not None and start.value > limit * (1 + TOLERANCE):
        start = None
    return search_sum(costs, devices, start)


def _search_interval(
    problem: Problem, tables: SpanTables, devices: Sequence[int], limit: float, exact: Search | None
) -> tuple[Route | None, float]:
    """Search the least interval with the problem's sessions in flight; a proven lower bound comes along."""
    start: tuple[Route | None, float] = None, 0.0
    if problem.num_sessions > 1 or exact is None:  # among many devices it also finds what fits at all
        costs = bottleneck_costs(problem, tables)
        start = search_bottleneck(costs, devices) if exact is None else _proven(exact(costs))
        if start[0] is None or start[0].value > limit * (1 + TOLERANCE):
            return None, 0.0

    def quickest(cap: float) -> tuple[Route | None, float]:
        costs = latency_costs(problem, tables, cap)
        return search_sum(costs, devices, start[0]) if exact is None else _proven(exact(costs))

    return search_interval(problem, tables, quickest, start, limit, MAX_SEARCHES if exact is None else math.inf)


def _proven(route: Route | None) -> tuple[Route | None, float]:
    return route, math.inf if route is None else route.value


def _decide(
    problem: Problem,
    tables: SpanTables,
    objective: Objective,
    limit: float,
    route: Route,
    exact: Search | None,
    along: tuple[int, ...] | None,
) -> Placement:
    """Let the linear programme choose the spans along the order that was found, ties going to the lower latency."""
    if objective == "energy":
        joules_per_s = LATENCY_PRICE * (route.value or 1.0) / latency_s(problem, route.placement)
        priced = energy_costs(problem, tables, limit, joules_per_s)
        route = (exact(priced) if exact is not None else None) or route
        networks = _networks(energy_costs(problem, tables, limit), along or route.order)
        quickest = latency_costs(problem, tables, limit)
        least_j = energy_j(problem, solve_programme(networks))
        second = [Network.of(quickest, network.devices, network.ring) for network in networks]
        return solve_programme(tight_networks(networks, second, least_j))
    if objective == "throughput":
        limit = min(limit, route.value)
        costs = latency_costs(problem, tables, limit)
        route = (exact(costs) if exact is not None else None) or route
    else:
        costs = latency_costs(problem, tables, limit)
    return solve_programme(_networks(costs, along or route.order))


def _networks(costs: Costs, order: Sequence[int]) -> list[Network]:
    """Give the networks along an order that may hold the cheapest placement: the plain one and the best rings."""
    plain = Network.of(costs, order)
    rings = list(rings_within(costs, order, plain.best()))
    best = min([plain.best(), *(value for _, value in rings)])
    return [plain, *(network for network, value in rings if value <= best * (1 + 1e-9))]

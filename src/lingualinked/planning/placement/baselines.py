"""Placements to compare the solver with: even, by memory, and the least sum of costs.

Knows one problem, and its devices in the order given; what the planner would do better is not asked here.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.placement.problem import Floats, Placement, Problem, Span, device_bytes
from lingualinked.planning.placement.solver import solve_problem
from lingualinked.planning.plan_checks import check_num_stages
from lingualinked.quantities import bytes_text, count_text


def even(problem: Problem) -> Placement:
    """Give every device the same number of layers, the first ones one more where that does not come out even.

    Parameters
    ----------
    problem : Problem
        The problem.

    Returns
    -------
    tuple of Span
        One per device, in the order given.

    Raises
    ------
    InfeasiblePlanError
        If there are more devices than layers, or a device lacks memory or a permission for its share.
    """
    return _in_shares(problem, np.ones(problem.num_devices))


def by_memory(problem: Problem) -> Placement:
    """Give every device layers in proportion to its memory; the same number if a device's memory is not limited.

    Parameters
    ----------
    problem : Problem
        The problem.

    Returns
    -------
    tuple of Span
        One per device, in the order given, of at least one layer.

    Raises
    ------
    InfeasiblePlanError
        If there are more devices than layers, or a device lacks memory or a permission for its share.
    """
    capacity = problem.capacity_bytes
    return _in_shares(problem, capacity if np.isfinite(capacity).all() else np.ones(problem.num_devices))


def sum_objective(problem: Problem) -> Placement:
    """Minimise the sum of compute and communication subject to memory, as LinguaLinked does.

    That sum is the latency of a step. It never rewards that stages work at the same time, so that a device which would
    not shorten a single step is skipped.

    Parameters
    ----------
    problem : Problem
        The problem.

    Returns
    -------
    tuple of Span
        In the order given.

    Raises
    ------
    InfeasiblePlanError
        If there is no placement in that order.

    References
    ----------
    .. [1] J. Zhao et al., "LinguaLinked: A Distributed Large Language Model Inference System for Mobile Devices",
       arXiv:2312.00388, 2023.
    """
    return solve_problem(problem, "latency", order=tuple(range(problem.num_devices))).placement


def _in_shares(problem: Problem, shares: Floats) -> Placement:
    """Round shares to whole layers, at least one each, the largest remainders up."""
    num_devices, num_layers = problem.num_devices, problem.num_layers
    if num_devices > num_layers:
        raise InfeasiblePlanError(
            f"{count_text(num_devices, 'stage')} for {count_text(num_layers, 'layer')}: a stage holds at least one layer, "
            f"so use at most {count_text(num_layers, 'device')}"
        )
    spare = num_layers - num_devices
    exact = np.maximum(shares, 0) / max(np.maximum(shares, 0).sum(), 1e-300) * num_layers
    beyond_one = np.maximum(exact - 1, 0)
    beyond_one *= spare / beyond_one.sum() if beyond_one.sum() > 0 else 0
    counts = np.floor(beyond_one + 1e-9).astype(int)
    counts[np.argsort(counts - beyond_one, kind="stable")[: spare - counts.sum()]] += 1
    bounds = _at_allowed_cuts([0, *np.cumsum(counts + 1).tolist()], problem.forbidden_cuts)
    placement = tuple(Span(device, bounds[device], bounds[device + 1]) for device in range(num_devices))
    _check(problem, placement)
    return placement


def _at_allowed_cuts(bounds: list[int], forbidden_cuts: Collection[int]) -> list[int]:
    """Move each boundary on to the nearest layer at which a span may begin, and that leaves room for those behind it."""
    allowed = [layer for layer in range(bounds[-1]) if layer not in forbidden_cuts]
    check_num_stages(len(bounds) - 1, bounds[-1], forbidden_cuts)
    moved = [0]
    for index, bound in enumerate(bounds[1:-1], 1):
        first, last = allowed.index(moved[-1]) + 1, len(allowed) - (len(bounds) - 2 - index)
        moved.append(min(allowed[first:last], key=lambda layer: abs(layer - bound)))
    return [*moved, bounds[-1]]


def _check(problem: Problem, placement: Placement) -> None:
    first, last = placement[0].device, placement[-1].device
    for allowed, device, what in ((problem.may_be_first, first, "first"), (problem.may_be_last, last, "last")):
        if not allowed[device]:
            raise InfeasiblePlanError(
                f"device {problem.names[device]!r} may not hold the {what} stage; put a trusted device there"
            )
    for span in placement:
        missing = device_bytes(problem, placement, span.device) - problem.capacity_bytes[span.device]
        if missing > 0:
            raise InfeasiblePlanError(
                f"layers [{span.start}, {span.end}) exceed the memory of device {problem.names[span.device]!r} by "
                f"{bytes_text(missing, round_up=True)}; give it fewer layers, or raise its memory",
                missing_bytes=math.ceil(missing),
            )

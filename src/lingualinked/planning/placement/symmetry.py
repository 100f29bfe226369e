"""Among placements that differ only in which of several like devices comes where, the one in the devices' order.

Knows problems and placements; a placement's value and latency stay what they are.
"""

from __future__ import annotations

from collections import defaultdict

from lingualinked.planning.placement.problem import (
    Placement,
    Problem,
    Span,
    bottleneck_s,
    device_bytes,
    energy_j,
    latency_s,
)
from lingualinked.planning.placement.tables import TOLERANCE


def in_listed_order(problem: Problem, placement: Placement) -> Placement:
    """Exchange like devices so that they are used, and stand in the pipeline, in the order in which they are listed.

    Parameters
    ----------
    problem : Problem
        The problem.
    placement : tuple of Span
        A placement of it.

    Returns
    -------
    tuple of Span
        The same spans; on other devices only where bottleneck, latency, energy and memory allow it.
    """
    groups: defaultdict[object, list[int]] = defaultdict(list)
    for device in range(problem.num_devices):
        groups[_likeness(problem, device)].append(device)
    new_device: dict[int, int] = {}
    for group in groups.values():
        used = list(dict.fromkeys(span.device for span in placement if span.device in group))
        new_device |= dict(zip(used, group, strict=False))
    listed = tuple(Span(new_device[span.device], span.start, span.end) for span in placement)
    return listed if _is_as_good(problem, listed, placement) else placement


def _likeness(problem: Problem, device: int) -> object:
    """Everything about a device that is its own, and not of a link to one other device."""
    own = (problem.stage_s, problem.first_s, problem.last_s, problem.capacity_bytes, problem.stage_bytes)
    ends = (problem.enter_s, problem.enter_busy_s, problem.leave_s, problem.leave_busy_s, problem.watts)
    may = (problem.may_be_first, problem.may_be_last, problem.may_close)
    figures = [
        str(each[device]) for each in (*own, *ends, *may)
    ]  # as text: unknown watts are NaN, which equals nothing
    return (*figures, problem.layer_s[device].tobytes())


def _is_as_good(problem: Problem, listed: Placement, placement: Placement) -> bool:
    if any(device_bytes(problem, listed, span.device) > problem.capacity_bytes[span.device] for span in listed):
        return False
    measures = [bottleneck_s, latency_s]
    if all(problem.watts[span.device] > 0 for span in placement):
        measures.append(energy_j)
    return all(measure(problem, listed) <= measure(problem, placement) * (1 + TOLERANCE) for measure in measures)

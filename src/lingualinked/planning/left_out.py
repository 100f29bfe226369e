"""From how many sessions in flight on the devices would pay that a plan leaves out.

Knows plans and the solver; nothing of how a text is shown.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.plan import Plan
from lingualinked.planning.planner import solve

_MANY = 10**6  # sessions, as many as fill any pipeline
_PLAINLY = 1.01  # times as many tokens per second


def sessions_to_pay(plan: Plan) -> dict[str, int | None]:
    """Find, for each device that a plan leaves out, the sessions in flight from which on it would be used; ``None``: never.

    Plans are solved along the order in which a full pipeline has its devices, for more and more sessions; memory is planned
    for those of the workload, as in the plan.
    """
    profile = plan.measured
    left_out = [name for name in profile.names if name not in plan.devices]
    now = plan.predicted.workload
    best = functools.partial(solve, profile, workload=now, reserve=plan.reserve)
    try:
        full = best(num_sessions=_MANY) if left_out else plan
    except InfeasiblePlanError:  # what was placed by hand need not respect every limit
        return dict.fromkeys(left_out)
    order = [*full.devices, *(name for name in profile.names if name not in full.devices)]

    @functools.cache
    def used(num_sessions: int) -> frozenset[str]:
        other = best(order=order, num_sessions=num_sessions)
        gain = _rate(other, num_sessions) / _rate(plan, num_sessions)
        return frozenset(other.devices) if gain > _PLAINLY else frozenset()

    tried = range(now.num_sessions + 1, max(now.num_sessions, full.predicted.sessions_to_fill) + 2)

    def first_to_use(name: str) -> int | None:
        if name not in used(tried[-1]):
            return None
        return tried[bisect.bisect_left(tried, True, key=lambda number: name in used(number))]

    return {name: first_to_use(name) for name in left_out}


def _rate(plan: Plan, num_sessions: int) -> float:
    return plan.predict(dataclasses.replace(plan.predicted.workload, num_sessions=num_sessions)).tokens_per_s

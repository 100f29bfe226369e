"""The best plan for the speeds of now, and what moving to it would save and cost.

Knows plans and profiles; not whether the move is worth it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence

from lingualinked.device import Device
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.plan import Plan
from lingualinked.planning.planner import solve
from lingualinked.planning.prediction import Prediction, step_s_of, value_of
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import Profile
from lingualinked.telemetry.decisions import Migration, moves_between
from lingualinked.workload import Objective, Workload

_STALL_STEPS = 2.0  # that sessions wait at the switch, about
_LOAD_BYTES_PER_S = 5e8  # until a migration has shown it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A plan to move to, with figures of a mean step under the objective."""

    plan: Plan  # the best one that is known; the one in force if there is none better
    before_s: float  # from one step to the next, or on the way of one for the objective "latency"
    after_s: float
    saved: float  # share of the objective's value
    cost_s: float  # seconds of the pipeline's time that moving costs
    moved_bytes: int  # weights and KV


class LoadRate:
    """How fast weights are loaded, learned from migrations."""

    def __init__(self) -> None:
        self._load_bytes_per_s = _LOAD_BYTES_PER_S

    def learn(self, migration: Migration) -> None:
        """Learn from a migration."""
        if migration.weight_bytes > 0 and migration.load_s > 0:
            self._load_bytes_per_s = migration.weight_bytes / migration.load_s

    def load_s(self, num_bytes: float) -> float:
        """Seconds in which so many bytes of weights are loaded."""
        return num_bytes / self._load_bytes_per_s


def propose(
    current: Plan,
    live: Profile,
    unusable: Sequence[str],
    objective: Objective,
    load_rate: LoadRate,
    min_gain: float,
    num_sessions: int,
    *,
    keep_order: bool = False,
    may_lose_exactness: bool = False,
) -> Proposal:
    """Solve for the speeds of now, and compare the plan in force with what was found.

    Devices keep their order, in which fewer layers move, unless another one is better by ``min_gain``. An exact plan is
    left only for an exact one, on devices that round alike, unless nothing else fits and exactness may be lost. Plans are
    to be fast for ``num_sessions`` in flight; memory is planned for those of the workload.
    """
    now = dataclasses.replace(current, profile=live)
    usable = [name for name in live.names if name not in unusable]
    if not usable:
        raise InfeasiblePlanError("no usable device is left: admit one")
    pool = usable
    if current.exact:
        kinds = {_rounding(live.device(name).device) for name in current.devices}
        pool = [name for name in usable if _rounding(live.device(name).device) in kinds]
    best_in = functools.partial(
        _best, now, live, objective=objective, min_gain=min_gain, num_sessions=num_sessions, keep_order=keep_order
    )
    try:
        best = best_in(pool)
    except InfeasiblePlanError:
        if not may_lose_exactness or len(pool) == len(usable):
            raise
        best = best_in(usable)
    return weigh(now, best, live, objective, load_rate, num_sessions)


def weigh(
    current: Plan, other: Plan, live: Profile, objective: Objective, load_rate: LoadRate, num_sessions: int
) -> Proposal:
    """Return what moving from one plan to another would save and cost, with some sessions in flight."""
    workload = _in_flight(current, live, num_sessions)
    before, after = (dataclasses.replace(plan, profile=live).predict(workload) for plan in (current, other))
    old, new = value_of(before, objective), value_of(after, objective)
    cost_s, moved_bytes = _cost(current, other, live, before, load_rate)
    return Proposal(
        plan=other,
        before_s=step_s_of(before, objective),
        after_s=step_s_of(after, objective),
        saved=1 - new / old if old > 0 else 0.0,
        cost_s=cost_s,
        moved_bytes=moved_bytes,
    )


def _best(
    now: Plan,
    live: Profile,
    pool: Sequence[str],
    *,
    objective: Objective,
    min_gain: float,
    num_sessions: int,
    keep_order: bool,
) -> Plan:
    """Return the best plan that leaves devices in their order or, unless they keep it, one that is plainly better."""
    profile = live.without(*(name for name in live.names if name not in pool))
    kept = [name for name in now.devices if name in pool]
    order = [*kept, *(name for name in pool if name not in kept)]
    solved = functools.partial(
        solve,
        profile,
        objective=objective,
        workload=now.workload,
        reserve=now.reserve,
        min_tokens_per_s=None if now.solved is None else now.solved.min_tokens_per_s,
        num_sessions=num_sessions,
    )
    if keep_order:
        return solved(order=order)
    workload = _in_flight(now, live, num_sessions)
    best = solved()
    if best.devices != tuple(name for name in order if name in best.devices):
        with contextlib.suppress(InfeasiblePlanError):
            ordered = solved(order=order)
            least, other = (value_of(plan.predict(workload), objective) for plan in (best, ordered))
            if least > (1 - min_gain) * other:
                return ordered
    return best


def _in_flight(plan: Plan, live: Profile, num_sessions: int) -> Workload:
    """Return the plan's workload with so many sessions in flight."""
    return dataclasses.replace(live.model.fit_workload(plan.workload), num_sessions=num_sessions)


def _rounding(device: Device) -> tuple[str, int | None]:
    """Return what the last bits of a device's results depend on, if known."""
    kind = device.accelerator.split(":")[0]
    return kind, device.threads if kind == "cpu" else None


def _cost(current: Plan, other: Plan, live: Profile, before: Prediction, load_rate: LoadRate) -> tuple[float, int]:
    moves = moves_between(current.spans, other.spans)
    if not moves:
        return 0.0, 0
    costs, model = WorkloadCosts(live, live.model.fit_workload(current.workload), current.reserve), live.model
    loaded: dict[str, int] = {}
    kv_bytes, copy_s = 0, 0.0
    for move in moves:
        loaded[move.target] = loaded.get(move.target, 0) + model.span_bytes(move.start, move.end)
        num_bytes = costs.kv_bytes(move.start, move.end)
        link = live.link(move.source, move.target)
        kv_bytes += num_bytes
        copy_s += link.latency_s + link.transfer_s(num_bytes)
    cost_s = max(map(load_rate.load_s, loaded.values()), default=0.0) + copy_s + _STALL_STEPS * before.step_s
    return cost_s if math.isfinite(cost_s) else math.inf, sum(loaded.values()) + kv_bytes

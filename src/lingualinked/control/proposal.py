"""The best plan for the speeds of now, and what moving to it would save and cost.

Knows plans and profiles; not whether the move is worth it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence

from lingualinked.environment import rounding_key
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.plan import Plan
from lingualinked.planning.planner import solve
from lingualinked.planning.prediction import step_s_of, value_of
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import DeviceProfile, Profile
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


class Proposer:
    """Finds plans for the speeds of now, and says what moving to a plan would save and cost, under one objective.

    Plans are to be fast for some sessions in flight; memory is planned for those of the workload.
    """

    def __init__(self, objective: Objective, min_gain: float) -> None:
        self._objective = objective
        self._min_gain = min_gain
        self._load_bytes_per_s: float | None = None

    def learn_load_rate(self, migration: Migration) -> None:
        """Learn from a migration how fast weights are loaded."""
        if migration.weight_bytes > 0 and migration.load_s > 0:
            self._load_bytes_per_s = migration.weight_bytes / migration.load_s

    def propose(
        self,
        current: Plan,
        unusable: Sequence[str],
        num_sessions: int,
        *,
        keep_order: bool = False,
        may_lose_exactness: bool = False,
    ) -> Proposal:
        """Solve again, and compare the plan in force, with the profile of now, with what was found.

        Devices keep their order, in which fewer layers move, unless another one is better by ``min_gain``. An exact plan is
        left only for an exact one, on devices that round alike, unless nothing else fits and exactness may be lost.
        """
        live = current.measured
        usable = [name for name in live.names if name not in unusable]
        if not usable:
            raise InfeasiblePlanError("no usable device is left: admit one")
        pool = usable
        if current.exact:
            kinds = {_rounding(live.device(name)) for name in current.devices}
            pool = [name for name in usable if _rounding(live.device(name)) in kinds]
        try:
            best = self._best(current, pool, num_sessions, keep_order=keep_order)
        except InfeasiblePlanError:
            if not may_lose_exactness or len(pool) == len(usable):
                raise
            best = self._best(current, usable, num_sessions, keep_order=keep_order)
        return self.weigh(current, best, num_sessions)

    def weigh(self, current: Plan, other: Plan, num_sessions: int) -> Proposal:
        """Return what moving from the plan in force, with the profile of now, to another would save and cost."""
        workload = _in_flight(current, num_sessions)
        before, after = (
            dataclasses.replace(plan, profile=current.profile).predict(workload) for plan in (current, other)
        )
        old, new = value_of(before, self._objective), value_of(after, self._objective)
        cost_s, moved_bytes = self._cost(current, other, before.step_s)
        return Proposal(
            plan=other,
            before_s=step_s_of(before, self._objective),
            after_s=step_s_of(after, self._objective),
            saved=1 - new / old if old > 0 else 0.0,
            cost_s=cost_s,
            moved_bytes=moved_bytes,
        )

    def _best(self, now: Plan, pool: Sequence[str], num_sessions: int, *, keep_order: bool) -> Plan:
        """Return the best plan that leaves devices in their order or, unless they keep it, one that is plainly better."""
        live, workload = now.measured, _in_flight(now, num_sessions)
        kept = [name for name in now.devices if name in pool]
        order = [*kept, *(name for name in pool if name not in kept)]
        solved = functools.partial(
            solve,
            live.without(*(name for name in live.names if name not in pool)),
            objective=self._objective,
            workload=now.workload,
            reserve=now.reserve,
            min_tokens_per_s=None if now.solved is None else now.solved.min_tokens_per_s,
            num_sessions=workload.num_sessions,
        )
        if keep_order:
            return solved(order=order)
        best = solved()
        if best.devices != tuple(name for name in order if name in best.devices):
            with contextlib.suppress(InfeasiblePlanError):
                ordered = solved(order=order)
                least, other = (value_of(plan.predict(workload), self._objective) for plan in (best, ordered))
                if least > (1 - self._min_gain) * other:
                    return ordered
        return best

    def _cost(self, current: Plan, other: Plan, step_s: float) -> tuple[float, int]:
        """Return the seconds that moving costs, and the bytes of weights and KV that are moved."""
        moves = moves_between(current.spans, other.spans)
        if not moves:
            return 0.0, 0
        live = current.measured
        costs, model = WorkloadCosts(live, live.model.fit_workload(current.workload), current.reserve), live.model
        loaded: dict[str, int] = {}
        kv_bytes, copy_s = 0, 0.0
        for move in moves:
            loaded[move.target] = loaded.get(move.target, 0) + model.span_bytes(move.start, move.end)
            num_bytes = costs.kv_bytes(move.start, move.end)
            link = live.link(move.source, move.target)
            kv_bytes += num_bytes
            copy_s += link.latency_s + link.transfer_s(num_bytes)
        load_s = max(num_bytes / self._load_rate(live, target) for target, num_bytes in loaded.items())
        cost_s = load_s + copy_s + _STALL_STEPS * step_s
        return cost_s if math.isfinite(cost_s) else math.inf, sum(loaded.values()) + kv_bytes

    def _load_rate(self, live: Profile, device: str) -> float:
        """Return the bytes of weights per second that a device loads; on another host, it may have to fetch them first."""
        if self._load_bytes_per_s is not None:
            return self._load_bytes_per_s
        if live.device(device).device.address is None:
            return _LOAD_BYTES_PER_S
        links = [link.bandwidth_bytes_per_s or math.inf for link in live.links if link.target == device]
        return min(_LOAD_BYTES_PER_S, max(links))


def _in_flight(plan: Plan, num_sessions: int) -> Workload:
    """Return the plan's workload with so many sessions in flight, each a microbatch if its batches are split."""
    workload = plan.measured.model.fit_workload(plan.workload)
    return dataclasses.replace(workload, num_sessions=math.ceil(num_sessions / (workload.num_microbatches or 1)))


def _rounding(profile: DeviceProfile) -> tuple[object, ...]:
    """Return what the last bits of a device's results depend on, if known."""
    return rounding_key(profile.device, profile.environment)

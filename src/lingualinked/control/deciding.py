"""Decides between the plan in force and others, for the speeds and the sessions of now.

Knows profiles, plans and the policy; neither what has happened, nor when something is to be decided.
"""

from __future__ import annotations

import dataclasses
import math

from lingualinked.control.events import Instruction, Migrate, Stay
from lingualinked.control.live_profile import LiveProfile
from lingualinked.control.policy import RebalancePolicy
from lingualinked.control.proposal import Proposal, Proposer
from lingualinked.control.sessions import SessionLevel
from lingualinked.control.timing import Trigger
from lingualinked.control.verdict import Verdict, judge
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.passage.holdings import Holdings
from lingualinked.planning.passage.transition import transition
from lingualinked.planning.plan import Plan
from lingualinked.profile import Profile
from lingualinked.quantities import count_text
from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.workload import Objective, Workload

_MOST_SAVED = 0.99


class Decider:
    """What decides for one pipeline; its live profile and sessions are kept up by others.

    Without a profile, only plans that are given are answered. ``workload`` counts where the plan in force has none.
    """

    def __init__(
        self,
        live_profile: LiveProfile | None,
        sessions: SessionLevel,
        policy: RebalancePolicy,
        objective: Objective,
        workload: Workload | None,
    ) -> None:
        self._live_profile = live_profile
        self._sessions = sessions
        self._policy = policy
        self._objective = objective
        self._workload = workload
        self._proposer = Proposer(objective, policy.min_gain)

    @property
    def live(self) -> LiveProfile:
        """The profile of now."""
        assert self._live_profile is not None, "without a profile, only plans that are given are answered"
        return self._live_profile

    def learn_cost(self, migration: Migration) -> None:
        """Learn what moving costs."""
        self._proposer.learn_load_rate(migration)

    def decide(
        self,
        time_s: float,
        plan: Plan,
        trigger: Trigger,
        *,
        is_asked: bool = False,
        dry_run: bool = False,
        is_release: bool = False,
    ) -> tuple[Instruction, bool]:
        """Return what is to be done, and whether time alone may change the answer."""
        # 1) find the best plan, and judge it
        live = self.live.profile()
        try:
            proposal = self._propose(plan, live, may_lose_exactness=is_release)
        except InfeasiblePlanError as error:
            if is_release:
                raise
            return self.decide_to_stay(time_s, plan, trigger.text, f"no plan fits: {error}"), True
        verdict = self._judge(time_s, plan, proposal, trigger, is_asked=is_asked)
        # 2) find the way there; if memory leaves none, take the best plan in the present order of devices
        plans: tuple[Plan, ...] = ()
        if verdict.is_worth_it:
            try:
                plans = self._way(plan, proposal.plan, live)
            except InfeasiblePlanError as no_way:
                try:
                    proposal = self._propose(plan, live, keep_order=True, may_lose_exactness=is_release)
                    verdict = self._judge(time_s, plan, proposal, trigger, is_asked=is_asked)
                    plans = self._way(plan, proposal.plan, live) if verdict.is_worth_it else ()
                    reason = f"{verdict.reason}; devices keep their order, since memory leaves no way to a better one"
                    verdict = dataclasses.replace(verdict, reason=reason)
                except InfeasiblePlanError:
                    if is_release:
                        raise
                    verdict = dataclasses.replace(verdict, reason=f"{verdict.reason}; but {no_way}", may_change=True)
        # 3) say so, with the numbers
        done = self._conclude(time_s, plan, trigger.text, verdict.reason, proposal, plans, dry_run=dry_run)
        return done, verdict.may_change

    def move_to_given(
        self, time_s: float, plan: Plan, given: Plan, holdings: Holdings | None, *, dry_run: bool
    ) -> Instruction:
        """Return how to move to a plan that the user gives; ``holdings`` count where nothing is measured."""
        live = None if self._live_profile is None else self._live_profile.profile()
        for name in given.devices:
            if live is not None and name not in live.names:
                raise InfeasiblePlanError(f"device {name!r} has not been measured for this model: admit it first")
        is_current = given.spans == plan.spans
        plans = () if is_current else self._way(plan, given, live, holdings)
        reason = "the plan is the one in force" if is_current else "the plan was given"
        trigger, proposal = "rebalance was called with a plan", self._weigh(plan, given, live)
        return self._conclude(time_s, plan, trigger, reason, proposal, plans, dry_run=dry_run)

    def decide_to_stay(self, time_s: float, plan: Plan, trigger: str, reason: str) -> Instruction:
        """Return the decision to go on as it is."""
        return self._conclude(time_s, plan, trigger, reason, self._weigh(plan, plan, self.live.profile()))

    def with_profile(self, plan: Plan, profile: Profile) -> Plan:
        """Return a plan as if it had been made from a profile."""
        return dataclasses.replace(plan, profile=profile, workload=plan.workload or self._workload)

    def _propose(
        self, plan: Plan, live: Profile, *, keep_order: bool = False, may_lose_exactness: bool = False
    ) -> Proposal:
        return self._proposer.propose(
            self.with_profile(plan, live),
            self.live.unusable(),
            self._sessions.num_sessions,
            keep_order=keep_order,
            may_lose_exactness=may_lose_exactness,
        )

    def _judge(self, time_s: float, plan: Plan, proposal: Proposal, trigger: Trigger, *, is_asked: bool) -> Verdict:
        return judge(
            plan,
            proposal,
            self._policy,
            speed_error=self.live.error(plan.devices),
            lasts_s=self._lasts_s(time_s, proposal),
            is_required=trigger.requires_move,
            is_asked=is_asked,
        )

    def _lasts_s(self, time_s: float, proposal: Proposal) -> float:
        """Return the seconds for which what a proposal saves is expected to be saved."""
        if self._live_profile is None:
            return 0.0
        # Half of what is saved is not undone by less than this, on any device.
        size = -math.log1p(-min(max(proposal.saved, 0.0), _MOST_SAVED)) / 2
        speeds_last_s = self._live_profile.expected_stable_s(time_s, self._policy.horizon_s, size)
        if self._objective != "throughput":
            return speeds_last_s
        return min(speeds_last_s, self._sessions.expected_stable_s(time_s))

    def _weigh(self, plan: Plan, other: Plan, live: Profile | None) -> Proposal:
        """Hold another plan against the one in force; where nothing is measured, all figures are 0."""
        if live is None:
            return Proposal(plan=other, before_s=0.0, after_s=0.0, saved=0.0, cost_s=0.0, moved_bytes=0)
        return self._proposer.weigh(self.with_profile(plan, live), other, self._sessions.num_sessions)

    def _way(
        self, plan: Plan, target: Plan, live: Profile | None, unmeasured: Holdings | None = None
    ) -> tuple[Plan, ...]:
        """Return the plans to go through, so that no device holds more than its memory on the way."""
        if live is not None:
            workload = plan.workload or target.workload or self._workload
            unmeasured = Holdings.of_profile(live, live.model.fit_workload(workload))
        assert unmeasured is not None, "where nothing is measured, a given plan comes with what devices can hold"
        return transition(plan, target, unmeasured)

    def _conclude(
        self,
        time_s: float,
        plan: Plan,
        trigger: str,
        reason: str,
        proposal: Proposal,
        plans: tuple[Plan, ...] = (),
        *,
        dry_run: bool = False,
    ) -> Instruction:
        """Return the instruction to put these plans in force, or to stay if there are none, with its decision."""
        if len(plans) > 1:
            reason = f"{reason}; in {count_text(len(plans), 'move')}, for memory"
        horizon_s = self._lasts_s(time_s, proposal)
        decision = Decision(
            time_s=time_s,
            action="move" if plans else "stay",
            trigger=trigger,
            reason=reason,
            spans_before=plan.spans,
            spans_after=proposal.plan.spans,
            before_s=proposal.before_s,
            after_s=proposal.after_s,
            gain_s=horizon_s * proposal.saved,
            cost_s=proposal.cost_s,
            horizon_s=horizon_s,
            moved_bytes=proposal.moved_bytes,
            slowdowns={} if self._live_profile is None else self._live_profile.slowdowns(),
            dry_run=dry_run,
        )
        return Stay(decision) if dry_run or not plans else Migrate(plans=plans, decision=decision)

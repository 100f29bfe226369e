"""Decides when layers move: events in, an instruction out.

Knows the plan in force and the time as each event tells them; neither threads, nor processes, nor how layers are moved.
"""

from __future__ import annotations

import dataclasses
import math

from lingualinked.control.events import (
    DeviceJoined,
    DeviceLost,
    DeviceObserved,
    DeviceReleased,
    Event,
    Instruction,
    Migrate,
    MigrationDone,
    MigrationFailed,
    RebalanceAsked,
    Stay,
    StepObserved,
)
from lingualinked.control.live_profile import LiveProfile
from lingualinked.control.policy import RebalancePolicy
from lingualinked.control.proposal import LoadRate, Proposal, propose, weigh
from lingualinked.control.sessions import SessionLevel
from lingualinked.control.timing import Timing, Trigger
from lingualinked.control.verdict import Verdict, judge
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.passage.holdings import Holdings
from lingualinked.planning.passage.transition import transition
from lingualinked.planning.plan import Plan
from lingualinked.profile import Profile
from lingualinked.quantities import count_text
from lingualinked.telemetry.decisions import Decision
from lingualinked.telemetry.samples import DeviceSample, StepSample
from lingualinked.workload import Objective, Workload

_MANY_STEPS = 128  # after which speeds are known well
_MOST_SAVED = 0.99
_LARGE_CHANGE = 1.25  # times as long, or as short, from which on a change is decided at once


class Balancer:
    """One pipeline's balancer. It does not keep the plan in force, which comes with each event.

    It follows devices' speeds (`SpeedLevel`) and how many sessions are in flight (`SessionLevel`). When one has plainly
    changed, it solves again for the speeds and the sessions of now, and moves layers if a mean step takes less time by
    ``min_gain`` and by what may be chance, and if what is saved, for as long as speeds and sessions are expected to last, is
    ``margin`` times the cost of moving; not within ``cooldown_s`` of the last move, and ever later after moves that failed.
    A device whose memory runs out, or that is to be emptied, is relieved whatever it costs; one that has not been used for
    ``horizon_s`` may be faster by now, and is tried again; where the user asks, ``min_gain`` alone counts. Every decision
    comes out with its numbers, those to stay as well.

    Without a profile, only plans that are given are answered; unless it ``is_automatic``, only what the user asks moves
    layers. ``workload`` is what is planned for where the plan in force does not say so.
    """

    def __init__(
        self,
        profile: Profile | None,
        policy: RebalancePolicy,
        objective: Objective,
        workload: Workload | None = None,
        *,
        is_automatic: bool = True,
    ) -> None:
        self._policy = policy
        self._objective = objective
        self._workload = workload
        self._is_automatic = is_automatic
        self._live_profile = None if profile is None else LiveProfile(profile, policy.confidence, policy.horizon_s)
        planned = 1 if profile is None else profile.model.fit_workload(workload).num_sessions
        self._sessions = SessionLevel(planned, policy.horizon_s)
        self._load_rate = LoadRate()
        self._timing = Timing(policy.cooldown_s, policy.horizon_s)
        self._waiting: Trigger | None = None  # what is still to be decided
        self._releasing = ""  # the device that is being emptied at the user's wish
        self._decided_slowdowns: dict[str, float] = {}  # when it was last decided
        self._were_speeds_sure = False  # whether they were known well then

    @property
    def profile(self) -> Profile | None:
        """The profile as measured."""
        return None if self._live_profile is None else self._live_profile.measured

    @property
    def _live(self) -> LiveProfile:
        assert self._live_profile is not None, "without a profile, only plans that are given are answered"
        return self._live_profile

    def handle(self, event: Event, plan: Plan) -> Instruction | None:
        """Learn from an event; return what is to be done, if anything.

        Events come in order of time, none while layers move. Raises InfeasiblePlanError if the user asks for what no plan can
        give, or for a plan that memory leaves no way to.
        """
        match event:
            case RebalanceAsked(plan=Plan() as given):
                return self._on_plan_given(event, plan, given)
            case MigrationDone():
                self._on_done(event)
            case MigrationFailed():
                self._timing.record_failure(event.time_s)
                self._keep_released()
            case _ if self._live_profile is None:
                return None
            case StepObserved():
                return self._on_step(event.sample, plan)
            case DeviceObserved():
                return self._on_device(event.sample, plan)
            case DeviceJoined():
                self._live.extend(event.profile)
                self._live[event.device].is_usable = True
                joined = Trigger(f"device {event.device!r} has joined")
                return self._decide(event.time_s, plan, joined, is_asked=True)
            case DeviceReleased():
                return self._on_released(event, plan)
            case DeviceLost():
                self._live[event.device].is_usable = False
                lost = event.device in plan.devices
                reason = "its layers and their KV are gone" if lost else "it held no layer"
                return self._stay(event.time_s, plan, f"device {event.device!r} is lost", reason)
            case RebalanceAsked():
                asked = Trigger("rebalance was called")
                return self._decide(event.time_s, plan, asked, is_asked=True, dry_run=event.dry_run)
        return None

    def _on_step(self, sample: StepSample, plan: Plan) -> Instruction | None:
        if self._timing.is_disturbed(sample.time_s):
            return None
        shifted = self._live.observe(sample)
        num_before = self._sessions.num_sessions
        is_other_number = self._sessions.observe(sample) and self._objective == "throughput"
        if not self._is_automatic:
            return None
        done_s = sample.time_s + sample.total_s
        forgotten = self._live.forget_unused(done_s, plan.devices)
        trigger = None
        if shifted:
            device, ratio = max(shifted.items(), key=lambda each: abs(math.log(each[1])))
            is_large = max(ratio, 1 / ratio) >= _LARGE_CHANGE
            trigger = Trigger(f"device {device!r} takes {ratio:.2f} times as long as before", is_large=is_large)
            self._were_speeds_sure = False
            self._timing.record_change()
        elif is_other_number:
            text = f"sessions in flight: about {self._sessions.num_sessions}, and {num_before} before"
            trigger = Trigger(text, is_large=True)
            self._timing.record_change()
        elif forgotten:
            trigger = Trigger(f"device {forgotten[0]!r} has not been used for long, and may be faster by now")
        elif self._waiting is None:
            trigger = self._drift(plan)
        if trigger is not None:
            self._waiting = trigger.beside(self._waiting)
        return self._decide_in_time(done_s, plan)

    def _on_device(self, sample: DeviceSample, plan: Plan) -> Instruction | None:
        if sample.device not in self._live:
            return None
        estimate = self._live[sample.device]
        if estimate.cap_bytes is not None and sample.time_s >= estimate.cap_until_s:
            estimate.cap_bytes = None
        total = sample.held_bytes + sample.available_bytes
        allowed = self._policy.max_memory * total
        if sample.held_bytes > allowed and self._is_automatic and sample.device in plan.devices:
            predicted = self._with_profile(plan, self._live.measured).predicted.devices
            used = next(each.used_bytes for each in predicted if each.device == sample.device)
            estimate.cap_bytes = used * allowed / sample.held_bytes / (1 - plan.reserve)
            estimate.cap_until_s = sample.time_s + self._policy.horizon_s
            share = 100 * sample.held_bytes / total
            text = f"device {sample.device!r} has {share:.0f} % of its memory in use"
            is_known = self._waiting is not None and self._waiting.requires_move  # then the pause lasts
            self._waiting = Trigger(text, requires_move=True, is_large=not is_known).beside(self._waiting)
        return self._decide_in_time(sample.time_s, plan)

    def _on_plan_given(self, event: RebalanceAsked, plan: Plan, given: Plan) -> Instruction:
        live = None if self._live_profile is None else self._live_profile.profile()
        for name in given.devices:
            if live is not None and name not in live.names:
                raise InfeasiblePlanError(f"device {name!r} has not been measured for this model: admit it first")
        is_current = given.spans == plan.spans
        plans = () if is_current else self._way(plan, given, live, event.holdings)
        reason = "the plan is the one in force" if is_current else "the plan was given"
        proposal = self._weigh(plan, given, live)
        trigger = "rebalance was called with a plan"
        return self._conclude(self._decision(event.time_s, plan, trigger, reason, proposal), plans, event.dry_run)

    def _on_released(self, event: DeviceReleased, plan: Plan) -> Instruction | None:
        text = f"device {event.device!r} is released"
        if event.device in self._live:
            self._live[event.device].is_usable = False
        if event.device not in plan.devices:
            return self._stay(event.time_s, plan, text, "it holds no layer")
        self._releasing = event.device
        try:
            return self._decide(event.time_s, plan, Trigger(text, requires_move=True), is_release=True)
        except InfeasiblePlanError:
            self._keep_released()
            raise

    def _keep_released(self) -> None:
        """Go on using a device that was to be emptied, since that has failed."""
        if self._releasing:
            self._live[self._releasing].is_usable = True
        self._releasing = ""

    def _on_done(self, event: MigrationDone) -> None:
        self._load_rate.learn(event.migration)
        self._timing.record_migration(event.time_s)
        self._waiting, self._releasing = None, ""

    def _drift(self, plan: Plan) -> Trigger | None:
        """Return why to decide again by speeds that are known well by now; ``None`` if there is no need."""
        levels = {name: self._live[name].level for name in plan.devices}
        if any(level.num_samples < _MANY_STEPS for level in levels.values()):
            return None
        if not self._were_speeds_sure:
            self._were_speeds_sure = True
            return Trigger(f"speeds are known from {_MANY_STEPS} steps")
        for name, level in levels.items():
            ratio = level.slowdown / self._decided_slowdowns.get(name, 1.0)
            if max(ratio, 1 / ratio) > 1 / (1 - self._policy.min_gain):
                return Trigger(f"device {name!r} takes {ratio:.2f} times as long as at the last decision")
        return None

    def _decide_in_time(self, time_s: float, plan: Plan) -> Instruction | None:
        if self._waiting is None or not self._timing.may_decide(self._waiting, time_s):
            return None
        return self._decide(time_s, plan, self._waiting)

    def _decide(
        self,
        time_s: float,
        plan: Plan,
        trigger: Trigger,
        *,
        is_asked: bool = False,
        dry_run: bool = False,
        is_release: bool = False,
    ) -> Instruction:
        # 1) nothing waits any more
        self._live.forget_unused(time_s, plan.devices)
        if not dry_run:
            self._waiting, self._decided_slowdowns = None, self._live.slowdowns()
            self._timing.record_decision(time_s)
        # 2) find the best plan, and judge it
        live = self._live.profile()
        try:
            proposal = self._propose(plan, live, may_lose_exactness=is_release)
        except InfeasiblePlanError as error:
            if is_release:
                raise
            self._try_again(time_s, trigger, dry_run=dry_run)
            return self._stay(time_s, plan, trigger.text, f"no plan fits: {error}")
        verdict = self._judge(time_s, plan, proposal, trigger, is_asked=is_asked)
        # 3) find the way there; if memory leaves none, take the best plan in the present order of devices
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
        # 4) what time may change is decided again later on
        if verdict.may_change:
            self._try_again(time_s, trigger, dry_run=dry_run)
        return self._conclude(self._decision(time_s, plan, trigger.text, verdict.reason, proposal), plans, dry_run)

    def _try_again(self, time_s: float, trigger: Trigger, *, dry_run: bool) -> None:
        """Decide once more later on, since waiting may change the answer."""
        if self._is_automatic and not dry_run:
            self._waiting = dataclasses.replace(trigger, is_large=False)
            self._timing.record_rejection(time_s)

    def _judge(self, time_s: float, plan: Plan, proposal: Proposal, trigger: Trigger, *, is_asked: bool) -> Verdict:
        return judge(
            plan,
            proposal,
            self._policy,
            speed_error=self._live.error(plan.devices),
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
        speeds_last_s = self._live.expected_stable_s(time_s, self._policy.horizon_s, size)
        if self._objective != "throughput":
            return speeds_last_s
        return min(speeds_last_s, self._sessions.expected_stable_s(time_s))

    def _conclude(self, decision: Decision, plans: tuple[Plan, ...], dry_run: bool) -> Instruction:
        if len(plans) > 1:
            decision = dataclasses.replace(
                decision, reason=f"{decision.reason}; in {count_text(len(plans), 'move')}, for memory"
            )
        decision = dataclasses.replace(decision, action="move" if plans else "stay", dry_run=dry_run)
        return Stay(decision) if dry_run or not plans else Migrate(plans=plans, decision=decision)

    def _decision(self, time_s: float, plan: Plan, trigger: str, reason: str, proposal: Proposal) -> Decision:
        horizon_s = self._lasts_s(time_s, proposal)
        return Decision(
            time_s=time_s,
            action="stay",
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
        )

    def _stay(self, time_s: float, plan: Plan, trigger: str, reason: str) -> Stay:
        proposal = self._weigh(plan, plan, self._live.profile())
        return Stay(self._decision(time_s, plan, trigger, reason, proposal))

    def _propose(
        self, plan: Plan, live: Profile, *, keep_order: bool = False, may_lose_exactness: bool = False
    ) -> Proposal:
        return propose(
            self._with_profile(plan, live),
            live,
            self._live.unusable(),
            self._objective,
            self._load_rate,
            self._policy.min_gain,
            self._sessions.num_sessions,
            keep_order=keep_order,
            may_lose_exactness=may_lose_exactness,
        )

    def _weigh(self, plan: Plan, other: Plan, live: Profile | None) -> Proposal:
        """Hold another plan against the one in force; where nothing is measured, all figures are 0."""
        if live is None:
            return Proposal(plan=other, before_s=0.0, after_s=0.0, saved=0.0, cost_s=0.0, moved_bytes=0)
        num_sessions = self._sessions.num_sessions
        return weigh(self._with_profile(plan, live), other, live, self._objective, self._load_rate, num_sessions)

    def _way(
        self, plan: Plan, target: Plan, live: Profile | None, unmeasured: Holdings | None = None
    ) -> tuple[Plan, ...]:
        """Return the plans to go through, so that no device holds more than its memory on the way."""
        if live is not None:
            workload = plan.workload or target.workload or self._workload
            unmeasured = Holdings.of_profile(live, live.model.fit_workload(workload))
        assert unmeasured is not None, "where nothing is measured, a given plan comes with what devices can hold"
        return transition(plan, target, unmeasured)

    def _with_profile(self, plan: Plan, profile: Profile) -> Plan:
        return dataclasses.replace(plan, profile=profile, workload=plan.workload or self._workload)

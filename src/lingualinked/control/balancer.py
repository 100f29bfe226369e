"""Decides when layers move: events in, an instruction out.

Knows what it is told and the time that each event carries; neither threads, nor processes, nor how layers are moved.
"""

from __future__ import annotations

import dataclasses
import math

from lingualinked.control.beliefs import Beliefs
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
    Record,
    StepObserved,
)
from lingualinked.control.policy import RebalancePolicy
from lingualinked.control.proposal import Proposal, Rates, propose, weigh
from lingualinked.control.sessions import SessionLevel
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.passage.holdings import Holdings
from lingualinked.planning.passage.transition import transition
from lingualinked.planning.plan import Plan
from lingualinked.profile import Profile
from lingualinked.quantities import count_text, seconds_text
from lingualinked.telemetry.decisions import Decision
from lingualinked.telemetry.samples import DeviceSample, StepSample
from lingualinked.workload import Objective

_MANY_STEPS = 128  # after which speeds are known well
_MOST_DOUBLINGS = 10
_MOST_SAVED = 0.99
_PLAIN = 1.25  # times as long, or as short, from which on a change is looked into at once
_PAUSE_S = 5.0  # between decisions because of lesser ones: each takes the caller some 15 ms of processor time
_SURE = 2.0  # standard errors of a speed that a gain must exceed besides


class Balancer:
    """One pipeline's balancer.

    It follows devices' speeds (`SpeedLevel`) and how many sessions are in flight (`SessionLevel`). When one has plainly
    changed, it solves again for the speeds and the sessions of now, and moves layers if a mean step takes less time by
    ``min_gain`` and by what may be chance, and if what is saved, for as long as speeds and sessions are expected to last, is
    ``margin`` times the cost of moving; not within ``cooldown_s`` of the last move, and ever later after moves that failed.
    A device whose memory runs out, or that is to be emptied, is relieved whatever it costs; one that has not been used for
    ``horizon_s`` may be faster by now, and is tried again; where the user asks, ``min_gain`` alone counts. Every decision
    comes out with its numbers, those to stay as well.

    Parameters
    ----------
    plan : Plan
        In force.
    profile : Profile
        Of the devices as they were measured.
    policy : RebalancePolicy
        Its knobs.
    objective : {"throughput", "latency", "energy"}
        What is minimised.
    is_automatic : bool
        Whether steps and looks at devices may make it move; else only what the user asks.
    """

    def __init__(
        self,
        plan: Plan,
        profile: Profile,
        policy: RebalancePolicy,
        objective: Objective,
        *,
        is_automatic: bool = True,
    ) -> None:
        self._plan = plan
        self._policy = policy
        self._objective = objective
        self._is_automatic = is_automatic
        self._beliefs = Beliefs(profile, policy.confidence, policy.horizon_s)
        self._rates = Rates()
        self._sessions = SessionLevel(profile.model.fit_workload(plan.workload).num_sessions, policy.horizon_s)
        self._target: Plan | None = None
        self._releasing = ""  # the device that is being emptied at the user's wish
        self._trigger = ""  # what waits to be decided
        self._is_urgent = self._is_plain = False
        self._not_before_s = 0.0  # nothing is decided of its own accord until then
        self._patient_s = 0.0  # and until then only what is plain
        self._settled_s = 0.0  # steps from before tell of a migration, not of speeds
        self._num_failures = self._num_vain = 0
        self._decided: dict[str, float] = {}  # slowdowns when it was last decided
        self._is_sure = False  # whether that was when they were known well

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    @property
    def profile(self) -> Profile:
        """The profile as measured."""
        return self._beliefs.measured

    def handle(self, event: Event) -> Instruction | None:
        """Take in an event; say what is to be done, if anything.

        Parameters
        ----------
        event : Event
            Later than those before.

        Raises
        ------
        InfeasiblePlanError
            If the user asks for what no plan can give.
        """
        match event:
            case StepObserved():
                return self._on_step(event.sample)
            case DeviceObserved():
                return self._on_device(event.sample)
            case DeviceJoined():
                self._beliefs.extend(event.profile)
                self._beliefs[event.device].is_usable = True
                return self._decide(event.time_s, f"device {event.device!r} has joined", asked=True)
            case DeviceReleased():
                return self._on_released(event)
            case DeviceLost():
                self._beliefs[event.device].is_usable = False
                lost = event.device in self._plan.devices
                reason = "its layers and their KV are gone" if lost else "it held no layer"
                return Record(self._stay(event.time_s, f"device {event.device!r} is lost", reason))
            case RebalanceAsked():
                return self._on_asked(event)
            case MigrationDone():
                self._on_done(event)
            case MigrationFailed():
                self._on_failed(event)
        return None

    def _on_step(self, sample: StepSample) -> Instruction | None:
        if self._target is not None or sample.time_s < self._settled_s:
            return None
        shifted = self._beliefs.observe(sample)
        num_before = self._sessions.num_sessions
        is_other_number = self._sessions.observe(sample) and self._objective == "throughput"
        if not self._is_automatic:
            return None
        done_s = sample.time_s + sample.total_s
        forgotten = self._beliefs.forget(done_s, self._plan.devices)
        if shifted:
            device, ratio = max(shifted.items(), key=lambda each: abs(math.log(each[1])))
            self._is_plain = self._is_plain or max(ratio, 1 / ratio) >= _PLAIN
            self._trigger = f"device {device!r} takes {ratio:.2f} times as long as before"
            self._num_vain, self._is_sure = 0, False
        elif is_other_number:
            self._trigger = f"sessions in flight: about {self._sessions.num_sessions}, and {num_before} before"
            self._num_vain, self._is_plain = 0, True
        elif forgotten:
            self._trigger = f"device {forgotten[0]!r} has not been used for long, and may be faster by now"
        elif not self._trigger:
            self._trigger = self._drift()
        return self._decide_in_time(done_s)

    def _on_device(self, sample: DeviceSample) -> Instruction | None:
        if sample.device not in self._beliefs or self._target is not None:
            return None
        belief = self._beliefs[sample.device]
        if belief.cap_bytes is not None and sample.time_s >= belief.cap_until_s:
            belief.cap_bytes = None
        total = sample.held_bytes + sample.available_bytes
        allowed = self._policy.max_memory * total
        if sample.held_bytes > allowed and self._is_automatic and sample.device in self._plan.devices:
            predicted = dataclasses.replace(self._plan, profile=self._beliefs.measured).predicted.devices
            used = next(each.used_bytes for each in predicted if each.device == sample.device)
            belief.cap_bytes = used * allowed / sample.held_bytes / (1 - self._plan.reserve)
            belief.cap_until_s = sample.time_s + self._policy.horizon_s
            share = 100 * sample.held_bytes / total
            self._trigger = f"device {sample.device!r} has {share:.0f} % of its memory in use"
            self._is_urgent, self._is_plain = True, self._is_plain or not self._is_urgent
        return self._decide_in_time(sample.time_s)

    def _on_asked(self, event: RebalanceAsked) -> Instruction:
        if event.plan is None:
            decided = self._decide(event.time_s, "rebalance was called", asked=True, dry_run=event.dry_run)
            assert decided is not None
            return decided
        live = self._beliefs.profile()
        for name in event.plan.devices:
            if name not in live.names:
                raise InfeasiblePlanError(f"device {name!r} has not been measured for this model: admit it first")
        proposal = self._weigh(event.plan, live)
        reason = "the plan is the one in force" if self._is_current(event.plan) else "the plan was given"
        plans = () if self._is_current(event.plan) else self._way(event.plan, live)
        decision = self._decision(event.time_s, "rebalance was called with a plan", reason, proposal)
        return self._conclude(decision, plans, dry_run=event.dry_run)

    def _on_released(self, event: DeviceReleased) -> Instruction | None:
        trigger = f"device {event.device!r} is released"
        if event.device in self._beliefs:
            self._beliefs[event.device].is_usable = False
        if event.device not in self._plan.devices:
            return Record(self._stay(event.time_s, trigger, "it holds no layer"))
        self._releasing = event.device
        try:
            return self._decide(event.time_s, trigger, must=True, is_release=True)
        except InfeasiblePlanError:
            self._keep_released()
            raise

    def _keep_released(self) -> None:
        """Use a device further that was to be emptied, since that has failed."""
        if self._releasing:
            self._beliefs[self._releasing].is_usable = True
        self._releasing = ""

    def _on_done(self, event: MigrationDone) -> None:
        self._plan, self._target, self._releasing = event.plan, None, ""
        self._rates.learn(event.migration)
        self._settled_s = event.time_s
        self._not_before_s = event.time_s + self._policy.cooldown_s
        self._num_failures = self._num_vain = 0
        self._trigger = ""

    def _on_failed(self, event: MigrationFailed) -> None:
        self._target = None
        self._plan = event.plan
        self._settled_s = event.time_s
        self._keep_released()
        self._num_failures += 1
        self._not_before_s = event.time_s + self._wait_s(self._num_failures)

    def _wait_s(self, times: int) -> float:
        """Give the seconds before it is tried again: longer and longer, up to the horizon."""
        wait_s = self._policy.cooldown_s * 2.0 ** min(times, _MOST_DOUBLINGS)
        return min(wait_s, max(self._policy.horizon_s, self._policy.cooldown_s))

    def _drift(self) -> str:
        """Say why to look again at speeds that are known well by now; empty if there is no need."""
        levels = {name: self._beliefs[name].level for name in self._plan.devices}
        if any(level.num_samples < _MANY_STEPS for level in levels.values()):
            return ""
        if not self._is_sure:
            self._is_sure = True
            return f"speeds are known from {_MANY_STEPS} steps"
        for name, level in levels.items():
            ratio = level.slowdown / self._decided.get(name, 1.0)
            if max(ratio, 1 / ratio) > 1 / (1 - self._policy.min_gain):
                return f"device {name!r} takes {ratio:.2f} times as long as at the last decision"
        return ""

    def _decide_in_time(self, time_s: float) -> Instruction | None:
        if not self._trigger or time_s < self._not_before_s or not (self._is_plain or time_s >= self._patient_s):
            return None
        return self._decide(time_s, self._trigger, must=self._is_urgent)

    def _decide(
        self,
        time_s: float,
        trigger: str,
        *,
        must: bool = False,
        asked: bool = False,
        dry_run: bool = False,
        is_release: bool = False,
    ) -> Instruction | None:
        self._beliefs.forget(time_s, self._plan.devices)
        if not dry_run:
            self._trigger, self._is_urgent = "", False
            self._decided, self._is_plain, self._patient_s = self._beliefs.slowdowns(), False, time_s + _PAUSE_S
        live = self._beliefs.profile()
        try:
            proposal = self._propose(live, may_lose_exactness=is_release)
        except InfeasiblePlanError as error:
            if is_release:
                raise
            self._try_again(time_s, trigger, is_urgent=must, dry_run=dry_run)
            return Record(self._stay(time_s, trigger, f"no plan fits: {error}"))
        is_worth, reason, is_late = self._judge(time_s, proposal, must=must, asked=asked)
        plans: tuple[Plan, ...] = ()
        if is_worth:
            try:
                plans = self._way(proposal.plan, live)
            except InfeasiblePlanError as no_way:
                try:
                    proposal = self._propose(live, keep_order=True, may_lose_exactness=is_release)
                    is_worth, reason, is_late = self._judge(time_s, proposal, must=must, asked=asked)
                    plans = self._way(proposal.plan, live) if is_worth else ()
                    reason += "; devices keep their order, since memory leaves no way to a better one"
                except InfeasiblePlanError:
                    if is_release:
                        raise
                    reason, is_late = f"{reason}; but {no_way}", True
        if is_late:
            self._try_again(time_s, trigger, is_urgent=must, dry_run=dry_run)
        decision = self._decision(time_s, trigger, reason, proposal)
        return self._conclude(decision, plans, dry_run=dry_run)

    def _way(self, plan: Plan, live: Profile) -> tuple[Plan, ...]:
        """Return the plans to go through, so that no device holds more than its memory on the way."""
        workload = live.model.fit_workload(self._plan.workload or plan.workload)
        return transition(self._plan, plan, Holdings.of_profile(live, workload))

    def _propose(self, live: Profile, *, keep_order: bool = False, may_lose_exactness: bool = False) -> Proposal:
        return propose(
            self._now(live),
            live,
            self._beliefs.unusable(),
            self._objective,
            self._rates,
            self._policy.min_gain,
            self._sessions.num_sessions,
            keep_order=keep_order,
            may_lose_exactness=may_lose_exactness,
        )

    def _try_again(self, time_s: float, trigger: str, *, is_urgent: bool, dry_run: bool) -> None:
        """Decide once more later on, since waiting may change the answer."""
        if dry_run or not self._is_automatic:
            return
        self._trigger, self._is_urgent = trigger, is_urgent
        self._num_vain += 1
        self._patient_s = time_s + self._wait_s(self._num_vain)

    def _judge(self, time_s: float, proposal: Proposal, *, must: bool, asked: bool) -> tuple[bool, str, bool]:
        """Say whether to move, why, and whether waiting may change that; who asks for a move bears its cost."""
        policy = self._policy
        if self._is_current(proposal.plan):
            return False, "the plan in force is the best one", False
        times = f"{seconds_text(proposal.after_s)} instead of {seconds_text(proposal.before_s)}"
        lost = (
            ""
            if proposal.plan.exact or not self._plan.exact
            else f"; exactness is lost: {proposal.plan.inexact_because}"
        )
        if must:
            return True, f"required: a mean step would take {times}{lost}", False
        share = f"a mean step would take {times}: {100 * proposal.saved:.1f} % saved"
        if proposal.saved < policy.min_gain:
            return False, f"{share}, less than min_gain={100 * policy.min_gain:g} %", False
        needed = policy.min_gain + _SURE * self._beliefs.error(self._plan.devices)
        if proposal.saved < needed and not asked:
            return False, f"{share}, less than the {100 * needed:.1f} % required while speeds are this uncertain", True
        lasts_s = self._lasts_s(time_s, proposal)
        gain_s = lasts_s * proposal.saved
        gain, lasts, cost = map(seconds_text, (gain_s, lasts_s, proposal.cost_s))
        figures = f"saves {gain} over the next {lasts} and costs {cost}"
        if gain_s <= policy.margin * proposal.cost_s and not asked:
            return False, f"a mean step would take {times}: {figures}, times margin={policy.margin:g}", True
        return True, f"a mean step would take {times}: {figures}{lost}", False

    def _lasts_s(self, time_s: float, proposal: Proposal) -> float:
        """Give the seconds for which what a proposal saves is expected to be saved."""
        # Half of what is saved is not undone by less than this, on any device.
        size = -math.log1p(-min(max(proposal.saved, 0.0), _MOST_SAVED)) / 2
        speeds_last_s = self._beliefs.persistence_s(time_s, self._policy.horizon_s, size)
        return (
            min(speeds_last_s, self._sessions.persistence_s(time_s))
            if self._objective == "throughput"
            else speeds_last_s
        )

    def _conclude(self, decision: Decision, plans: tuple[Plan, ...], *, dry_run: bool) -> Instruction:
        if len(plans) > 1:
            decision = dataclasses.replace(
                decision, reason=f"{decision.reason}; in {count_text(len(plans), 'move')}, for memory"
            )
        decision = dataclasses.replace(decision, action="move" if plans else "stay", dry_run=dry_run)
        if dry_run or not plans:
            return Record(decision)
        self._target = plans[-1]
        return Migrate(plans=plans, decision=decision)

    def _decision(self, time_s: float, trigger: str, reason: str, proposal: Proposal) -> Decision:
        horizon_s = self._lasts_s(time_s, proposal)
        return Decision(
            time_s=time_s,
            action="stay",
            trigger=trigger,
            reason=reason,
            spans_before=self._plan.spans,
            spans_after=proposal.plan.spans,
            before_s=proposal.before_s,
            after_s=proposal.after_s,
            gain_s=horizon_s * proposal.saved,
            cost_s=proposal.cost_s,
            horizon_s=horizon_s,
            moved_bytes=proposal.moved_bytes,
            slowdowns=self._beliefs.slowdowns(),
        )

    def _stay(self, time_s: float, trigger: str, reason: str) -> Decision:
        live = self._beliefs.profile()
        return self._decision(time_s, trigger, reason, self._weigh(self._plan, live))

    def _weigh(self, plan: Plan, live: Profile) -> Proposal:
        num_sessions = self._sessions.num_sessions
        return weigh(self._now(live), plan, live, self._objective, self._rates, num_sessions)

    def _now(self, live: Profile) -> Plan:
        return dataclasses.replace(self._plan, profile=live)

    def _is_current(self, plan: Plan) -> bool:
        return plan.spans == self._plan.spans

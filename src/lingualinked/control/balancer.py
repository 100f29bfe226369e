"""Decides when layers move: events in, an instruction out.

Knows the plan in force and the time as each event tells them; neither threads, nor processes, nor how layers are moved.
"""

from __future__ import annotations

import dataclasses
import math

from lingualinked.control.deciding import Decider
from lingualinked.control.drift import SpeedDrift
from lingualinked.control.events import (
    DeviceJoined,
    DeviceLost,
    DeviceReleased,
    Event,
    Instruction,
    MigrationDone,
    MigrationFailed,
    RebalanceAsked,
)
from lingualinked.control.live_profile import LiveProfile
from lingualinked.control.policy import RebalancePolicy
from lingualinked.control.sessions import SessionLevel
from lingualinked.control.timing import Timing, Trigger
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.plan import Plan
from lingualinked.profile import Profile
from lingualinked.telemetry.samples import DeviceSample, StepSample
from lingualinked.workload import Objective, Workload

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
        self._is_automatic = is_automatic
        self._live_profile = None if profile is None else LiveProfile(profile, policy.confidence, policy.horizon_s)
        planned = 1 if profile is None else profile.model.fit_workload(workload).num_sessions
        self._sessions = SessionLevel(planned, policy.horizon_s)
        self._decider = Decider(self._live_profile, self._sessions, policy, objective, workload)
        self._timing = Timing(policy.cooldown_s, policy.horizon_s)
        self._waiting: Trigger | None = None  # what is still to be decided
        self._releasing = ""  # the device that is being emptied at the user's wish
        self._drift = SpeedDrift(policy.min_gain)

    @property
    def profile(self) -> Profile | None:
        """The profile as measured."""
        return None if self._live_profile is None else self._live_profile.measured

    @property
    def _live(self) -> LiveProfile:
        return self._decider.live

    def handle(self, event: Event, plan: Plan) -> Instruction | None:
        """Learn from an event; return what is to be done, if anything.

        Events come in order of time, none while layers move. Raises InfeasiblePlanError if the user asks for what no plan can
        give, or for a plan that memory leaves no way to.
        """
        match event:
            case RebalanceAsked(plan=Plan() as given):
                return self._decider.move_to_given(event.time_s, plan, given, event.holdings, dry_run=event.dry_run)
            case MigrationDone():
                self._on_done(event)
            case MigrationFailed():
                self._timing.record_failure(event.time_s)
                self._keep_released()
            case _ if self._live_profile is None:
                return None
            case StepSample():
                return self._on_step(event, plan)
            case DeviceSample():
                return self._on_device(event, plan)
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
                return self._decider.decide_to_stay(event.time_s, plan, f"device {event.device!r} is lost", reason)
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
        forgotten = self._live.forget_unused(sample.end_s, plan.devices)
        trigger = None
        if shifted:
            device, ratio = max(shifted.items(), key=lambda each: abs(math.log(each[1])))
            is_large = max(ratio, 1 / ratio) >= _LARGE_CHANGE
            trigger = Trigger(f"device {device!r} takes {ratio:.2f} times as long as before", is_large=is_large)
            self._drift.record_shift()
            self._timing.record_change()
        elif is_other_number:
            text = f"sessions in flight: about {self._sessions.num_sessions}, and {num_before} before"
            trigger = Trigger(text, is_large=True)
            self._timing.record_change()
        elif forgotten:
            trigger = Trigger(f"device {forgotten[0]!r} has not been used for long, and may be faster by now")
        elif self._waiting is None:
            trigger = self._drift.find_trigger({name: self._live[name].level for name in plan.devices})
        if trigger is not None:
            self._waiting = trigger.beside(self._waiting)
        return self._decide_in_time(sample.end_s, plan)

    def _on_device(self, sample: DeviceSample, plan: Plan) -> Instruction | None:
        if sample.device not in self._live:
            return None
        estimate = self._live[sample.device]
        if estimate.cap_bytes is not None and sample.time_s >= estimate.cap_until_s:
            estimate.cap_bytes = None
        total = sample.held_bytes + sample.available_bytes
        allowed = self._policy.max_memory * total
        if sample.held_bytes > allowed and self._is_automatic and sample.device in plan.devices:
            predicted = self._decider.with_profile(plan, self._live.measured).predicted.devices
            used = next(each.used_bytes for each in predicted if each.device == sample.device)
            estimate.cap_bytes = used * allowed / sample.held_bytes / (1 - plan.reserve)
            estimate.cap_until_s = sample.time_s + self._policy.horizon_s
            share = 100 * sample.held_bytes / total
            text = f"device {sample.device!r} has {share:.0f} % of its memory in use"
            is_known = self._waiting is not None and self._waiting.requires_move  # then the pause lasts
            self._waiting = Trigger(text, requires_move=True, is_large=not is_known).beside(self._waiting)
        return self._decide_in_time(sample.time_s, plan)

    def _on_released(self, event: DeviceReleased, plan: Plan) -> Instruction | None:
        text = f"device {event.device!r} is released"
        if event.device in self._live:
            self._live[event.device].is_usable = False
        if event.device not in plan.devices:
            return self._decider.decide_to_stay(event.time_s, plan, text, "it holds no layer")
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
        self._decider.learn_cost(event.migration)
        self._timing.record_migration(event.time_s)
        self._waiting, self._releasing = None, ""

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
        self._live.forget_unused(time_s, plan.devices)
        if not dry_run:
            self._waiting = None
            self._drift.record_decision(self._live.slowdowns())
            self._timing.record_decision(time_s)
        instruction, may_change = self._decider.decide(
            time_s, plan, trigger, is_asked=is_asked, dry_run=dry_run, is_release=is_release
        )
        if may_change and self._is_automatic and not dry_run:
            self._waiting = dataclasses.replace(trigger, is_large=False)
            self._timing.record_rejection(time_s)
        return instruction

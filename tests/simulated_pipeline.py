"""A simulated pipeline that obeys a balancer: steps take what speeds and noise make of them, moves take their time."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable

import lingualinked as ll
from lingualinked.control.balancer import Balancer
from lingualinked.control.events import Event, Migrate, MigrationDone, MigrationFailed
from lingualinked.planning.workload_costs import stage_s
from lingualinked.profile import Profile
from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.samples import DeviceSample, StageTiming, StepSample

Speeds = Callable[[str, int], float]
IN_PIPELINE = 1.2  # what a step takes of what was measured alone


def steady(device: str, step: int) -> float:
    """No device ever changes."""
    return 1.0


class SimulatedPipeline:
    """Steps of the sessions in flight, as many as the plan's workload says, each told to the balancer."""

    def __init__(
        self,
        profile: Profile,
        plan: ll.Plan,
        policy: ll.RebalancePolicy | None = None,
        *,
        noise: Callable[[random.Random], float] = lambda rng: 1.0,
        seed: int = 0,
        objective: str = "throughput",
        migration_s: float = 0.3,
        fails: Callable[[int], bool] = lambda number: False,
        is_automatic: bool = True,
    ) -> None:
        self.replace_profile(profile)
        self.plan = plan
        self.balancer = Balancer(
            profile,
            policy or ll.RebalancePolicy(),
            objective,  # type: ignore[arg-type]
            plan.workload,
            is_automatic=is_automatic,
        )
        self.num_sessions = 1 if plan.workload is None else plan.workload.num_sessions
        self.time_s = 100.0
        self.num_steps = 0
        self.decisions: list[Decision] = []
        self.moved_at: list[int] = []
        self._noise = noise
        self._rng = random.Random(seed)
        self._migration_s = migration_s
        self._fails = fails
        self._ends: tuple[float, ll.Plan] | None = None

    def replace_profile(self, profile: Profile) -> None:
        """Go on with devices as fast as this says."""
        self.profile = profile
        self._stage_s = functools.cache(functools.partial(_stage_s, profile))

    def run(self, num_steps: int, speeds: Speeds = steady, *, tokens: int = 1) -> None:
        """Run decode steps, or prefill steps of so many tokens."""
        for _ in range(num_steps):
            sample = self._step(speeds, tokens)
            if self._ends is None:  # nothing is told while layers move
                self.tell(sample)
            self.time_s += sample.total_s / self.num_sessions
            self.num_steps += 1
            if self._ends is not None and self.time_s >= self._ends[0]:
                self._end()

    def look(self, device: str, held: int, available: int) -> None:
        """Look at a device's memory."""
        sample = DeviceSample(
            time_s=self.time_s, device=device, held_bytes=held, available_bytes=available, cpu_percent=50.0
        )
        self.tell(sample)

    def tell(self, event: Event) -> Decision | None:
        """Tell the balancer, and do what it says."""
        instruction = self.balancer.handle(event, self.plan)
        if instruction is None:
            return None
        self.decisions.append(instruction.decision)
        if isinstance(instruction, Migrate):
            self.moved_at.append(self.num_steps)
            self._ends = (self.time_s + self._migration_s, instruction.plans[-1])
            if self._migration_s == 0:
                self._end()
        return instruction.decision

    def spans(self) -> list[tuple[str, int, int]]:
        """Give the stages as they are."""
        return [(stage.device, stage.start, stage.end) for stage in self.plan.stages]

    def num_layers(self, device: str) -> int:
        """Count the layers on a device."""
        return sum(stage.num_layers for stage in self.plan.stages if stage.device == device)

    def _end(self) -> None:
        assert self._ends is not None
        _, plan = self._ends
        self._ends = None
        if self._fails(len(self.moved_at)):
            self.tell(MigrationFailed(time_s=self.time_s))
            return
        before = tuple(self.spans())
        self.plan = plan
        migration = Migration(
            time_s=self.time_s - self._migration_s,
            plan_version=len(self.moved_at) + 1,
            spans_before=before,
            spans_after=tuple(self.spans()),
            weight_bytes=10 << 20,
            kv_bytes=1 << 20,
            load_s=0.1,
            copy_s=0.02,
            switch_s=0.01,
            longest_stall_s=0.01,
            num_sessions=1,
        )
        self.tell(MigrationDone(time_s=self.time_s, migration=migration))

    def _step(self, speeds: Speeds, tokens: int) -> StepSample:
        context = 100 if tokens == 1 else 0
        stages = []
        for stage in self.plan.stages:
            seconds = self._stage_s(stage.device, stage.start, stage.end, tokens, context)
            seconds *= IN_PIPELINE * speeds(stage.device, self.num_steps) * self._noise(self._rng)
            stages.append(
                StageTiming(
                    device=stage.device,
                    start=stage.start,
                    end=stage.end,
                    hop_s=2e-4,
                    wait_s=0.0,
                    compute_s=seconds,
                    codec_s=1e-5,
                    sent_bytes=2208,
                )
            )
        busiest_s = max(stage.compute_s for stage in stages)
        return StepSample(
            time_s=self.time_s,
            session=self.num_steps % self.num_sessions,
            number=self.num_steps,
            plan_version=1,
            rows=1,
            tokens=tokens,
            context=context,
            total_s=max(self.num_sessions * busiest_s, sum(stage.total_s for stage in stages)),  # wait included
            stages=tuple(stages),
        )


def _stage_s(profile: Profile, device: str, start: int, end: int, tokens: int, context: int) -> float:
    return stage_s(profile.model, profile.device(device), start, end, 1, tokens, context)


def with_memory(profile: Profile, **memory: int) -> Profile:
    """Limit devices' memory, by name."""
    return dataclasses.replace(
        profile,
        devices=tuple(
            dataclasses.replace(
                each, device=dataclasses.replace(each.device, memory=memory.get(each.device.name, each.device.memory))
            )
            for each in profile.devices
        ),
    )

"""How many sessions are in flight, told from steps alone: prompt when it changes, calm under gaps and bursts."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

import lingualinked as ll
from lingualinked.control.events import RebalanceAsked
from lingualinked.control.sessions import SessionLevel
from lingualinked.telemetry.samples import StepSample
from tests.profiles import profile
from tests.simulated_pipeline import SimulatedPipeline

MIXED = profile(
    ll.Device(name="fast"), ll.Device(name="slow", slowdown=2.0), ll.Device(name="slower", slowdown=3.0), num_layers=24
)


def step(time_s: float, total_s: float, session: int = 0) -> StepSample:
    return StepSample(
        time_s=time_s,
        session=session,
        number=0,
        plan_version=1,
        rows=1,
        tokens=1,
        context=9,
        total_s=total_s,
        stages=(),
    )


def run(level: SessionLevel, num_sessions: int, start_s: float, seconds: float, pause: float = 0.0) -> float:
    """Run sessions whose steps take 50 ms each, with a pause of some steps' time between them; give when they ended."""
    rng = random.Random(num_sessions)
    steps = []
    for session in range(num_sessions):
        time_s = start_s + rng.uniform(0, 0.05)
        while time_s < start_s + seconds:
            total_s = 0.05 * rng.uniform(0.7, 1.3)
            steps.append(step(time_s, total_s, session))
            time_s += total_s + 0.05 * pause * rng.uniform(0, 2)
    for each in sorted(steps, key=lambda each: each.time_s + each.total_s):
        level.observe(each)
    return start_s + seconds + 0.1


@pytest.mark.parametrize("planned", [1, 4])
@pytest.mark.parametrize("num_sessions", [1, 2, 3, 8])
def test_sessions_in_flight_are_counted_within_seconds(planned: int, num_sessions: int) -> None:
    level = SessionLevel(planned, horizon_s=60.0)
    run(level, num_sessions, 0.0, 8.0)
    assert abs(level.num_sessions - num_sessions) <= num_sessions / 4


def test_chunks_of_a_prompt_are_one_session() -> None:
    level = SessionLevel(1, horizon_s=60.0)
    for time_s in range(100):
        for number in range(8):  # all are sent at once, and come back one after the other
            level.observe(step(time_s, 0.1 * (1 + number)))
    assert level.num_sessions == 1


def test_sessions_one_after_the_other_are_one() -> None:
    level = SessionLevel(1, horizon_s=60.0)
    time_s = 0.0
    for session in range(400):
        assert not level.observe(step(time_s, 0.05, session))
        time_s += 0.06
    assert level.num_sessions == 1


def test_gaps_between_steps_and_idle_hours_change_nothing() -> None:
    level = SessionLevel(2, horizon_s=60.0)
    time_s = run(level, 2, 0.0, 30.0, pause=0.3)
    run(level, 2, time_s + 7200, 30.0, pause=0.3)
    assert level.num_sessions == 2


def test_a_short_burst_changes_nothing() -> None:
    level = SessionLevel(1, horizon_s=60.0)
    time_s = run(level, 1, 0.0, 10.0)
    time_s = run(level, 8, time_s, 2.0)
    run(level, 1, time_s, 10.0)
    assert level.num_sessions == 1


def test_what_keeps_changing_is_expected_to_change_again() -> None:
    level = SessionLevel(1, horizon_s=60.0)
    time_s = 0.0
    assert level.expected_stable_s(time_s) == 60.0
    for num_sessions in (1, 8, 1, 8):
        time_s = run(level, num_sessions, time_s, 10.0)
    assert level.expected_stable_s(time_s) < 15.0
    assert level.expected_stable_s(time_s + 100.0) == 60.0


def pipeline(num_sessions: int, **arguments: object) -> SimulatedPipeline:
    workload = ll.Workload(num_sessions=num_sessions)
    return SimulatedPipeline(MIXED, ll.solve(MIXED, workload=workload), **arguments)  # type: ignore[arg-type]


def run_seconds(line: SimulatedPipeline, seconds: float) -> None:
    end_s = line.time_s + seconds
    while line.time_s < end_s:
        line.run(20)


def test_layers_spread_when_more_sessions_come_and_gather_when_they_have_gone() -> None:
    line = pipeline(1)
    assert line.plan.devices == ("fast",)
    run_seconds(line, 10.0)
    assert not line.moved_at
    line.num_sessions = 8
    run_seconds(line, 20.0)
    assert set(line.plan.devices) == {"fast", "slow", "slower"}
    best = ll.solve(MIXED, workload=ll.Workload(num_sessions=8)).predicted.interval_s
    reached = ll.Plan.from_spans(line.spans(), profile=MIXED, workload=ll.Workload(num_sessions=8)).predicted.interval_s
    assert reached <= best / 0.9
    moves = [said for said in line.decisions if said.action == "move"]
    assert moves[0].trigger == "sessions in flight: about 8, and 1 before"
    line.num_sessions = 1
    run_seconds(line, 60.0)
    assert line.plan.devices == ("fast",)
    assert len(line.moved_at) <= 4


def test_sessions_that_come_and_go_cause_no_oscillation() -> None:
    line = pipeline(1, policy=ll.RebalancePolicy(margin=40.0))
    for num_sessions in itertools.islice(itertools.cycle((1, 8)), 40):
        line.num_sessions = num_sessions
        run_seconds(line, 6.0)
    assert len(line.moved_at) <= 3


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_asking_decides_for_the_sessions_in_flight(objective: str) -> None:
    line = pipeline(1, is_automatic=False, objective=objective, migration_s=0.0)
    line.num_sessions = 8
    run_seconds(line, 20.0)
    assert not line.moved_at
    said = line.tell(RebalanceAsked(time_s=line.time_s))
    assert said is not None
    assert (said.action == "move") == (objective == "throughput")


def test_memory_is_planned_for_the_sessions_of_the_workload() -> None:
    """One session is in flight, and the fast device could hold it, but not the eight that were asked for."""
    workload = ll.Workload(prompt_tokens=1024, new_tokens=64, num_sessions=8)
    made = profile(
        ll.Device(name="fast", memory="350MiB"), ll.Device(name="slow", slowdown=2.0, memory="350MiB"), num_layers=24
    )
    alone = ll.solve(made, workload=dataclasses.replace(workload, num_sessions=1))
    assert alone.devices == ("fast",)
    line = SimulatedPipeline(made, ll.solve(made, workload=workload))
    line.num_sessions = 1
    run_seconds(line, 60.0)
    assert line.plan.workload == workload
    assert set(line.plan.devices) == {"fast", "slow"}

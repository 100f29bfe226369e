"""The balancer on a simulated pipeline: prompt when a device plainly changes, calm under everything else."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

import lingualinked as ll
from lingualinked.control.events import (
    DeviceJoined,
    DeviceLost,
    DeviceReleased,
    Migrate,
    RebalanceAsked,
)
from lingualinked.device import CALLER
from lingualinked.errors import InfeasiblePlanError
from tests.profiles import MIB, profile
from tests.simulated_pipeline import SimulatedPipeline, Speeds, with_memory

pytestmark = pytest.mark.slow

THREE = profile(ll.Device(name="a"), ll.Device(name="b"), ll.Device(name="c"), num_layers=24)


FULL = ll.Workload(num_sessions=8)  # enough to keep every device busy
PLANNED = ll.solve(THREE, workload=FULL)
SLOW = profile(ll.Device(name="a"), ll.Device(name="b", slowdown=4.0), ll.Device(name="c"), num_layers=24)
BEST_WHEN_SLOW = ll.solve(SLOW, workload=FULL)


def uniform(rng: random.Random) -> float:
    return rng.uniform(0.8, 1.2)


def normal(rng: random.Random) -> float:
    return max(0.3, rng.gauss(1, 0.2))


def slow_from(device: str, step: int, factor: float = 4.0) -> Speeds:
    return lambda name, number: factor if name == device and number >= step else 1.0


def pipeline(**arguments: object) -> SimulatedPipeline:
    return SimulatedPipeline(THREE, PLANNED, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [uniform, normal, lambda rng: 1.0], ids=["uniform", "normal", "none"])
def test_a_device_that_slows_down_is_relieved_within_twenty_steps(noise: object, seed: int) -> None:
    line = pipeline(noise=noise, seed=seed)
    layers = line.num_layers("b")
    line.run(200)
    assert not line.moved_at
    line.run(600, slow_from("b", 200))
    assert 200 <= line.moved_at[0] < 220
    assert line.num_layers("b") < layers / 2
    reached = ll.Plan.from_spans(line.spans(), profile=BEST_WHEN_SLOW.profile).predicted.bottleneck_s
    assert reached <= BEST_WHEN_SLOW.predicted.bottleneck_s / 0.9


@pytest.mark.parametrize("pause", [20, 30, 40])
def test_a_decision_to_stay_delays_no_other(pause: int) -> None:
    """The first change is not worth a move, and is thought over again later on; the second one is plain."""
    line = pipeline(noise=uniform, policy=ll.RebalancePolicy(horizon_s=1.5, margin=4.0))
    line.run(200)
    line.run(pause, slow_from("b", 200, 1.4))
    assert "and costs" in line.decisions[-1].reason
    assert not line.moved_at
    line.run(100, slow_from("b", 200, 5.0))
    assert line.moved_at[0] < 220 + pause


def test_it_goes_back_when_the_device_is_fast_again() -> None:
    line = pipeline(noise=normal)
    before = line.spans()
    line.run(200)
    line.run(3000, slow_from("b", 200))
    line.run(3000)
    assert len(line.moved_at) <= 3
    assert abs(line.num_layers("b") - {name: end - start for name, start, end in before}["b"]) <= 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("noise", [uniform, normal], ids=["uniform", "normal"])
def test_noise_moves_next_to_nothing(noise: object, seed: int) -> None:
    line = pipeline(noise=noise, seed=seed)
    line.run(5000)
    assert len(line.moved_at) <= 1


@pytest.mark.parametrize("period", [10, 16, 25, 40])
def test_a_device_that_alternates_faster_than_a_move_pays_causes_no_oscillation(period: int) -> None:
    line = pipeline(noise=uniform)
    line.run(100)
    line.run(80 * period, lambda name, number: 4.0 if name == "b" and number // period % 2 else 1.0)
    assert len(line.moved_at) <= 2


def test_what_changes_seldom_is_followed_each_time() -> None:
    line = pipeline(noise=uniform)
    period = 12_000
    line.run(3 * period, lambda name, number: 4.0 if name == "b" and number // period % 2 else 1.0)
    at = line.moved_at
    assert period <= at[0] < period + 20
    assert any(2 * period <= step < 2 * period + 20 for step in at)
    assert len(at) <= 4  # each time at once by what is known, and once more when it is known well


def test_a_device_that_was_emptied_is_tried_again_ever_less_often() -> None:
    line = pipeline(noise=uniform, policy=ll.RebalancePolicy(horizon_s=20.0))
    line.run(200)
    line.run(12_000, slow_from("b", 200, 30.0))
    assert line.num_layers("b") == 0
    emptied, tried = line.moved_at[::2], line.moved_at[1::2]
    pauses = [later - earlier for earlier, later in zip(emptied, tried, strict=False)]
    assert len(pauses) >= 2
    assert all(after > 1.5 * before for before, after in itertools.pairwise(pauses))


def test_a_device_that_was_emptied_is_used_again_once_it_is_fast() -> None:
    line = pipeline(noise=uniform, policy=ll.RebalancePolicy(horizon_s=20.0))
    layers = line.num_layers("b")
    line.run(200)
    line.run(1000, slow_from("b", 200, 30.0))
    assert line.num_layers("b") == 0
    line.run(6000)
    assert line.num_layers("b") == layers


def test_a_device_that_slows_down_bit_by_bit_is_relieved() -> None:
    line = pipeline(noise=uniform)
    layers = line.num_layers("b")
    line.run(4000, lambda name, number: 1 + 3 * number / 4000 if name == "b" else 1.0)
    assert line.num_layers("b") <= layers / 2


def test_a_device_that_was_slow_from_the_start_is_relieved() -> None:
    line = pipeline(noise=uniform)
    line.run(400, slow_from("b", 0))
    assert line.moved_at
    assert line.num_layers("b") <= 4


def test_devices_that_are_all_slower_alike_leave_the_layers_where_they_are() -> None:
    line = pipeline(noise=uniform)
    line.run(200)
    line.run(1000, lambda name, number: 3.0)
    assert not line.moved_at
    assert line.decisions
    assert all(decision.action == "stay" for decision in line.decisions)


def test_every_decision_says_why_with_its_numbers() -> None:
    line = pipeline()
    line.run(50)
    line.run(50, slow_from("b", 50))
    decision = next(each for each in line.decisions if each.action == "move")
    assert "'b'" in decision.trigger
    assert "saves" in decision.reason
    assert decision.after_s < decision.before_s
    assert decision.gain_s > 2 * decision.cost_s > 0
    assert decision.moved_bytes > 0
    assert decision.moves
    assert decision.slowdowns["b"] == pytest.approx(4 * decision.slowdowns["a"], rel=0.1)


def test_a_move_that_costs_more_than_it_saves_is_not_made() -> None:
    line = pipeline(policy=ll.RebalancePolicy(horizon_s=0.1))
    line.run(50)
    line.run(500, slow_from("b", 50))
    assert not line.moved_at
    assert "and costs" in line.decisions[-1].reason
    assert len(line.decisions) < 20  # it is thought over ever less often


def test_after_moves_that_fail_it_waits_ever_longer() -> None:
    line = pipeline(policy=ll.RebalancePolicy(cooldown_s=0.2), fails=lambda number: True)
    line.run(50)
    line.run(4000, slow_from("b", 50))
    gaps = [after - before for before, after in zip(line.moved_at, line.moved_at[1:], strict=False)]
    assert 2 <= len(line.moved_at) < 12
    assert gaps == sorted(gaps)


def test_asking_decides_at_once_and_a_dry_run_only_says() -> None:
    line = pipeline(is_automatic=False)
    line.run(50)
    line.run(50, slow_from("b", 50))
    assert not line.decisions  # not automatic: nothing of its own accord
    said = line.tell(RebalanceAsked(time_s=line.time_s, dry_run=True))
    assert said is not None
    assert said.moves
    assert not line.moved_at
    done = line.tell(RebalanceAsked(time_s=line.time_s))
    assert done is not None
    assert done.spans_after == said.spans_after
    assert line.moved_at


def test_asking_when_there_is_nothing_better_stays() -> None:
    line = pipeline(is_automatic=False)
    line.run(50)
    said = line.tell(RebalanceAsked(time_s=line.time_s))
    assert said is not None
    assert (said.action, said.moves) == ("stay", ())
    assert "best" in said.reason


def test_a_plan_that_is_given_is_taken() -> None:
    line = pipeline(is_automatic=False, migration_s=0.0)
    plan = ll.Plan.from_spans([("c", 0, 20), ("a", 20, 24)])
    said = line.tell(RebalanceAsked(time_s=line.time_s, plan=plan))
    assert said is not None
    assert line.spans() == [("c", 0, 20), ("a", 20, 24)]
    assert said.after_s > said.before_s
    again = line.tell(RebalanceAsked(time_s=line.time_s, plan=plan))
    assert again is not None
    assert again.action == "stay"


def test_a_released_device_is_emptied_whatever_it_costs_and_stays_empty() -> None:
    line = pipeline(policy=ll.RebalancePolicy(horizon_s=1e-3), migration_s=0.0)
    line.run(50)
    said = line.tell(DeviceReleased(time_s=line.time_s, device="b"))
    assert said is not None
    assert said.action == "move"
    assert line.num_layers("b") == 0
    line.run(500, slow_from("a", 300))
    assert line.num_layers("b") == 0
    line.tell(DeviceJoined(time_s=line.time_s, device="b", profile=THREE))
    assert line.balancer.handle(RebalanceAsked(time_s=line.time_s, dry_run=True), line.plan) is not None


def test_a_device_that_is_needed_can_not_be_released() -> None:
    tight = with_memory(THREE, a=110 * MIB, b=110 * MIB, c=110 * MIB)
    line = SimulatedPipeline(tight, ll.solve(tight))
    with pytest.raises(InfeasiblePlanError, match="short"):
        line.tell(DeviceReleased(time_s=line.time_s, device="b"))
    line.run(100)
    assert line.num_layers("b") > 0


def test_a_device_that_joins_is_used_if_that_pays() -> None:
    two = profile(ll.Device(name="a"), ll.Device(name="b"), num_layers=24)
    line = SimulatedPipeline(two, ll.solve(two, workload=FULL), migration_s=0.0)
    line.run(100)
    line.replace_profile(THREE)
    line.tell(DeviceJoined(time_s=line.time_s, device="c", profile=THREE))
    assert line.num_layers("c") >= 7
    slow = profile(
        ll.Device(name="a"), ll.Device(name="b"), ll.Device(name="c"), ll.Device(name="d", slowdown=50.0), num_layers=24
    )
    line.replace_profile(slow)
    line.tell(DeviceJoined(time_s=line.time_s, device="d", profile=slow))
    assert line.num_layers("d") == 0


def test_a_lost_device_is_said_and_never_used_again() -> None:
    four = profile(*(ll.Device(name=name) for name in "abcd"), num_layers=24)
    line = SimulatedPipeline(four, ll.Plan.from_spans([("a", 0, 8), ("b", 8, 16), ("c", 16, 24)], profile=four))
    said = line.tell(DeviceLost(time_s=line.time_s, device="d"))
    assert said is not None
    assert said.action == "stay"
    line.run(100)
    line.run(300, slow_from("b", 100))
    assert line.moved_at
    assert line.num_layers("d") == 0


def test_memory_that_runs_out_moves_layers_off_the_device() -> None:
    line = pipeline()
    line.run(50)
    layers = line.num_layers("b")
    line.look("b", held=90 * MIB, available=20 * MIB)
    assert not line.moved_at
    line.look("b", held=97 * MIB, available=2 * MIB)
    assert line.moved_at == [50]
    assert "memory" in line.decisions[-1].trigger
    line.run(50)
    assert line.num_layers("b") < layers
    line.look("b", held=80 * MIB, available=19 * MIB)
    line.run(200)
    assert len(line.moved_at) == 1


def test_an_exact_plan_is_left_only_for_one_that_is() -> None:
    mixed = profile(
        ll.Device(name="a", threads=1),
        ll.Device(name="b", threads=1),
        ll.Device(name="c", threads=4),
        num_layers=24,
    )
    plan = ll.Plan.from_spans([("a", 0, 12), ("b", 12, 24)], profile=mixed)
    line = SimulatedPipeline(mixed, plan)
    line.run(100)
    line.run(500, slow_from("b", 100))
    assert line.moved_at
    assert line.num_layers("c") == 0
    assert line.plan.exact


def test_prefill_alone_tells_speeds_too() -> None:
    line = pipeline(noise=uniform)
    line.run(60, tokens=64)
    line.run(60, slow_from("b", 60), tokens=64)
    assert line.moved_at
    assert line.moved_at[0] < 80


def test_while_layers_move_nothing_else_is_asked_for() -> None:
    line = pipeline()
    line.run(50)
    said = line.tell(RebalanceAsked(time_s=line.time_s, plan=ll.Plan.from_spans([("a", 0, 24)])))
    assert said is not None
    for _ in range(10):
        instruction = line.balancer.handle(RebalanceAsked(time_s=line.time_s, dry_run=True), line.plan)
        assert not isinstance(instruction, Migrate)


def test_memory_that_runs_out_costs_no_exactness() -> None:
    mixed = profile(
        ll.Device(name="a", threads=1), ll.Device(name="b", threads=1), ll.Device(name="c", threads=4), num_layers=24
    )
    tight = with_memory(mixed, a=136 * MIB, b=136 * MIB, c=136 * MIB)
    line = SimulatedPipeline(tight, ll.Plan.from_spans([("a", 0, 12), ("b", 12, 24)], profile=tight))
    line.run(50)
    line.look("b", held=135 * MIB, available=1 * MIB)
    assert not line.moved_at
    assert "no plan fits" in line.decisions[-1].reason
    said = line.tell(DeviceReleased(time_s=line.time_s, device="b"))
    assert said is not None
    assert "exactness is lost" in said.reason
    assert line.num_layers("b") == 12  # until it is done
    assert line.moved_at


def test_a_release_that_fails_leaves_the_device_in_use() -> None:
    line = pipeline(is_automatic=False, migration_s=0.0, fails=lambda number: number == 1)
    line.run(50)
    said = line.tell(DeviceReleased(time_s=line.time_s, device="b"))
    assert said is not None
    assert said.action == "move"
    assert line.num_layers("b") == 8
    again = line.tell(RebalanceAsked(time_s=line.time_s))
    assert again is not None
    assert again.action == "stay"
    assert line.num_layers("b") == 8


def test_a_plan_that_memory_leaves_no_way_to_is_refused_by_name() -> None:
    tight = with_memory(THREE, a=136 * MIB, b=136 * MIB)
    swapped = ll.Plan.from_spans([("b", 0, 12), ("a", 12, 24)])
    plan = ll.Plan.from_spans([("a", 0, 12), ("b", 12, 24)], profile=tight)
    balancer = SimulatedPipeline(tight, plan, is_automatic=False).balancer
    with pytest.raises(InfeasiblePlanError, match=r"device '[ab]' would hold .* short, .* order \(a, b\)") as caught:
        balancer.handle(RebalanceAsked(time_s=1.0, plan=swapped), plan)
    assert caught.value.missing_bytes is not None
    assert 100 * MIB < caught.value.missing_bytes < 136 * MIB


def test_devices_keep_their_order_where_memory_leaves_no_way_to_another() -> None:
    devices = [ll.Device(name=name, slowdown=slowdown) for name, slowdown in (("a", 1.0), ("b", 1.0), ("c", 3.0))]
    measured = profile(*devices, num_layers=12)
    slow = {(CALLER, "a"), (CALLER, "c"), ("b", "c"), ("c", "a"), ("c", "b")}
    links = tuple(
        dataclasses.replace(link, latency_s=0.1) if (link.source, link.target) in slow else link
        for link in measured.links
    )
    linked = dataclasses.replace(measured, links=links)
    present = ll.Plan.from_spans([("a", 0, 4), ("b", 4, 8), ("c", 8, 12)], profile=linked)
    for memory, order, reason in (
        (150, ["b"], "saves"),
        (90, ["b", "a"], "saves"),
        (54, ["a", "c"], "keep their order"),
    ):
        tight = with_memory(linked, a=memory * MIB, b=memory * MIB, c=96 * MIB)
        line = SimulatedPipeline(tight, present, objective="latency", is_automatic=False, migration_s=0.0)
        line.run(1)
        said = line.tell(RebalanceAsked(time_s=line.time_s))
        assert said is not None
        assert [name for name, _, _ in line.spans()] == order
        assert reason in said.reason


def test_what_is_not_measured_can_not_be_planned_on() -> None:
    line = pipeline(is_automatic=False)
    with pytest.raises(InfeasiblePlanError, match="device 'd' has not been measured for this model: admit it first"):
        line.tell(RebalanceAsked(time_s=1.0, plan=ll.Plan.from_spans([("d", 0, 24)])))
    said = line.tell(DeviceReleased(time_s=1.0, device="d"))
    assert said is not None
    assert said.action == "stay"

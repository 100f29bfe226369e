"""When the balancer may decide of its own accord, and what becomes of a trigger beside one that waits."""

from __future__ import annotations

import pytest

import lingualinked as ll
from lingualinked.control.balancer import Balancer
from lingualinked.control.events import DeviceLost, Migrate, RebalanceAsked, Stay
from lingualinked.control.timing import Timing, Trigger
from lingualinked.planning.even import WeightBytes
from lingualinked.planning.passage.holdings import Holdings

MINOR, LARGE = Trigger("a little slower"), Trigger("much slower", is_large=True)


def test_a_minor_change_waits_for_the_pause_and_a_large_one_does_not() -> None:
    timing = Timing(cooldown_s=2.0, horizon_s=60.0)
    timing.record_decision(100.0)
    assert not timing.may_decide(MINOR, 104.9)
    assert timing.may_decide(LARGE, 100.1)
    assert timing.may_decide(MINOR, 105.0)


def test_nothing_is_decided_soon_after_a_migration_and_ever_later_after_failures() -> None:
    timing = Timing(cooldown_s=2.0, horizon_s=60.0)
    timing.record_migration(100.0)
    assert timing.is_disturbed(99.9)
    assert not timing.is_disturbed(100.0)
    assert not timing.may_decide(LARGE, 101.9)
    assert timing.may_decide(LARGE, 102.0)
    waits = []
    for _ in range(7):
        timing.record_failure(200.0)
        waits.append(next(wait for wait in range(100) if timing.may_decide(LARGE, 200.0 + wait)))
    assert waits == [4, 8, 16, 32, 60, 60, 60]


def test_what_is_rejected_is_decided_ever_later_until_something_changes() -> None:
    timing = Timing(cooldown_s=2.0, horizon_s=60.0)
    for wait_s in (4.0, 8.0, 16.0):
        timing.record_rejection(100.0)
        assert not timing.may_decide(MINOR, 100.0 + wait_s - 0.1)
        assert timing.may_decide(MINOR, 100.0 + wait_s)
    timing.record_change()
    timing.record_rejection(100.0)
    assert timing.may_decide(MINOR, 104.0)


def test_a_trigger_is_as_urgent_as_the_one_that_waits() -> None:
    full = Trigger("memory is full", requires_move=True)
    assert MINOR.beside(None) is MINOR
    assert MINOR.beside(full) == Trigger("a little slower", requires_move=True)
    assert full.beside(LARGE) == Trigger("memory is full", requires_move=True, is_large=True)


def test_without_a_profile_only_plans_that_are_given_are_answered() -> None:
    balancer = Balancer(None, ll.RebalancePolicy(), "throughput", is_automatic=False)
    devices = [ll.Device(name="a", memory=60), ll.Device(name="b", memory=60)]
    holdings = Holdings.of_devices(WeightBytes(layers=(10,) * 10, prologue=0, epilogue=0), devices)
    plan = ll.Plan.from_spans([("a", 0, 5), ("b", 5, 10)])

    def ask(*spans: tuple[str, int, int]) -> Stay | Migrate | None:
        given = ll.Plan.from_spans(spans)
        return balancer.handle(RebalanceAsked(time_s=1.0, plan=given, holdings=holdings), plan)

    moved = ask(("a", 0, 4), ("b", 4, 10))
    assert isinstance(moved, Migrate)
    assert (moved.decision.action, moved.decision.cost_s, moved.decision.slowdowns) == ("move", 0.0, {})
    assert isinstance(ask(("a", 0, 5), ("b", 5, 10)), Stay)
    with pytest.raises(ll.InfeasiblePlanError, match="device 'b', which has 60 B: 10 B short"):
        ask(("a", 0, 3), ("b", 3, 10))
    assert balancer.handle(DeviceLost(time_s=2.0, device="b"), plan) is None
    assert balancer.profile is None

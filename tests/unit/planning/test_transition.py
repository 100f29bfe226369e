"""Plans to go through from one to another: each fits beside the one before, as counting layer by layer shows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

import lingualinked as ll
from lingualinked.planning.passage.holdings import Holdings, Spans
from lingualinked.planning.passage.transition import transition
from lingualinked.planning.passage.waves import merged
from lingualinked.transmission import Transmission
from lingualinked.weight_bytes import WeightBytes
from profiles import MIB, profile


def holdings(
    layers: Sequence[int],
    capacity: dict[str, float],
    *,
    ends: tuple[int, int, int] = (0, 0, 0),
    kv: Sequence[int] = (),
    working: int = 0,
    trusted: str = "",
    cuts: tuple[int, ...] = (),
) -> Holdings:
    return Holdings(
        weights=WeightBytes(layers=tuple(layers), prologue=ends[0], epilogue=ends[1], tied=ends[2]),
        devices=tuple(ll.Device(name=name, trusted=name in trusted) for name in capacity),
        capacity_bytes=tuple(capacity.values()),
        layer_kv=tuple(kv),
        working=working,
        transmission=Transmission(forbidden_cuts=cuts),
    )


def held(room: Holdings, device: str, *plans: Spans) -> int:
    """What a device holds of several plans at once, counted layer by layer."""
    own = [span for plan in plans for span in plan if span[0] == device]
    held_layers = {layer for _, start, end in own for layer in range(start, end)}
    num_layers, weights = len(room.weights.layers), room.weights
    kv = room.layer_kv or (0,) * num_layers
    first, last = 0 in held_layers, num_layers - 1 in held_layers
    return (
        sum(weights.layers[layer] + kv[layer] for layer in held_layers)
        + weights.prologue * first
        + weights.epilogue * last
        - weights.tied * (first and last)
        + room.working * max(sum(name == device for name, _, _ in plan) for plan in plans)
    )


def excess(room: Holdings, *plans: Spans) -> float:
    names = [device.name for device in room.devices]
    return max(held(room, name, *plans) - capacity for name, capacity in zip(names, room.capacity_bytes, strict=True))


def spans_of(plan: ll.Plan) -> Spans:
    return tuple((stage.device, stage.start, stage.end) for stage in plan.stages)


def devices_of(plan: Spans) -> list[str]:
    """The device of each layer."""
    return [device for device, start, end in plan for _ in range(start, end)]


def keeps_trust(spans: Spans, room: Holdings, kept: tuple[int, int]) -> bool:
    """Whether the first and the last layers, at least one each, are on trusted devices, if any is trusted."""
    trusted = {device.name for device in room.devices if device.trusted}
    front, back = max(1, kept[0]), len(room.weights.layers) - max(1, kept[1])
    return not trusted or all(name in trusted or (start >= front and end <= back) for name, start, end in spans)


def passed(before: Spans, after: Spans, room: Holdings, kept: tuple[int, int] = (0, 0)) -> list[Spans]:
    """Go from plan to plan; whatever is given is checked."""
    end = ll.Plan.from_spans(after, workload=ll.Workload(trusted_layers=kept))
    plans = transition(ll.Plan.from_spans(before), end, room)
    assert plans[-1] is end
    path = [before, *map(spans_of, plans)]
    names = [device.name for device in room.devices]
    for earlier, later in itertools.pairwise(path):
        for name, capacity in zip(names, room.capacity_bytes, strict=True):
            assert held(room, name, earlier, later) <= max(capacity, held(room, name, before))
    for each in path[1:]:
        assert not {start for _, start, _ in each} & set(room.transmission.forbidden_cuts)
        assert each[-1][2] == len(room.weights.layers)
        assert keeps_trust(each, room, kept)
        for old, new, now in zip(*map(devices_of, (before, after, each)), strict=True):
            assert now in (old, new)
    for plan in plans[:-1]:
        assert [each.weight_bytes for each in plan.stages] == [
            room.weights.of_span(each.start, each.end) for each in plan.stages
        ]
    return path[1:]


def all_plans(names: Sequence[str], num_layers: int, *, orders: bool = True, rings: bool = True) -> list[Spans]:
    """Every plan on these devices, in any order or in this one."""
    plans = []
    for size in range(1, min(len(names), num_layers) + 1):
        for chosen in itertools.permutations(names, size) if orders else itertools.combinations(names, size):
            for order in [chosen, (*chosen, chosen[0])] if rings and size > 1 else [chosen]:
                for cuts in itertools.combinations(range(1, num_layers), len(order) - 1):
                    ends = [0, *cuts, num_layers]
                    plans.append(tuple((name, ends[i], ends[i + 1]) for i, name in enumerate(order)))
    return plans


def distance(before: Spans, after: Spans, plans: Sequence[Spans], room: Holdings) -> int | None:
    """Number of steps of the shortest way over plans, each of which fits beside the one before."""
    seen, frontier, steps = {before}, [before], 0
    while frontier:
        if after in frontier:
            return steps
        reached = {plan for at in frontier for plan in plans if plan not in seen and excess(room, at, plan) <= 0}
        seen |= reached
        frontier, steps = list(reached), steps + 1
    return None


@st.composite
def rooms(draw: st.DrawFn, names: str, num_layers: int, *, trust: bool = False) -> Holdings:
    """Devices that can hold from a sixth of a small model to most of it."""
    layers = draw(st.lists(st.sampled_from([20, 20, 20, 30, 50]), min_size=num_layers, max_size=num_layers))
    prologue, epilogue = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    largest = sum(layers) * 3 // 4
    return holdings(
        layers,
        {name: float(draw(st.integers(20, largest))) for name in names},
        ends=(prologue, epilogue, draw(st.integers(0, min(prologue, epilogue)))),
        kv=draw(st.just([]) | st.lists(st.integers(0, 9), min_size=num_layers, max_size=num_layers)),
        working=draw(st.sampled_from([0, 0, 5])),
        trusted="".join(draw(st.sets(st.sampled_from(names)))) if trust else "",
    )


@st.composite
def moves(
    draw: st.DrawFn,
    names: str,
    num_layers: int,
    kept: tuple[int, int] = (0, 0),
    cuts: tuple[int, ...] = (),
    **options: bool,
) -> tuple[Holdings, list[Spans], Spans, Spans]:
    room = draw(rooms(names, num_layers, trust=options.pop("trust", False)))
    room = dataclasses.replace(room, transmission=Transmission(forbidden_cuts=cuts))
    plans = [
        plan
        for plan in all_plans(names, num_layers, **options)
        if excess(room, plan) <= 0 and not {start for _, start, _ in plan} & set(cuts) and keeps_trust(plan, room, kept)
    ]
    assume(len(plans) > 1)
    before, after = draw(st.sampled_from(plans)), draw(st.sampled_from(plans))
    return room, plans, before, after


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # most rooms hold no plan
@given(moves("abcd", 6, orders=False, rings=False, trust=True))
def test_along_one_order_there_is_always_a_way(move: tuple[Holdings, list[Spans], Spans, Spans]) -> None:
    room, plans, before, after = move
    path = passed(before, after, room)
    assert (len(path) == 1) == (excess(room, before, after) <= 0)
    best = distance(before, after, plans, room)
    assert best is not None
    assert len(path) <= max(best, 1) + 1


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(moves("abcd", 7, orders=False, rings=False, cuts=(2, 3, 5)))
def test_layers_that_must_stay_together_move_together(move: tuple[Holdings, list[Spans], Spans, Spans]) -> None:
    room, plans, before, after = move
    path = passed(before, after, room)
    best = distance(before, after, plans, room)
    assert best is not None
    assert len(path) <= max(best, 1) + 1


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(moves("abc", 6, kept=(2, 1), trust=True))
def test_trusted_layers_stay_on_trusted_devices_on_the_way(move: tuple[Holdings, list[Spans], Spans, Spans]) -> None:
    room, plans, before, after = move
    try:
        path = passed(before, after, room, kept=(2, 1))
    except ll.InfeasiblePlanError:  # devices may wait for each other where they change their order
        return
    best = distance(before, after, plans, room)
    assert best is not None
    assert len(path) >= best


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(moves("abc", 5, trust=True))
def test_whatever_is_given_can_be_gone(move: tuple[Holdings, list[Spans], Spans, Spans]) -> None:
    room, plans, before, after = move
    best = distance(before, after, plans, room)
    slots, _, _ = merged([each[0] for each in before], [each[0] for each in after])
    if len(set(slots)) == len(slots):
        assert best is not None
    try:
        path = passed(before, after, room)
    except ll.InfeasiblePlanError as error:
        missing_bytes = error.missing_bytes
    else:
        assert best is not None
        assert (len(path) == 1) == (best <= 1)
        return
    assert missing_bytes == pytest.approx(excess(room, before, after))
    assert best is None or (best > 1 and len(set(slots)) < len(slots))  # missed only where an order changes


ROW: Spans = (("a", 0, 4), ("b", 4, 8), ("c", 8, 12))


def test_what_fits_is_done_at_once() -> None:
    after: Spans = (("c", 0, 4), ("b", 4, 8), ("a", 8, 12))
    assert passed(ROW, after, holdings([1] * 12, dict.fromkeys("abc", 8.0))) == [after]
    assert passed(ROW, ROW, holdings([1] * 12, dict.fromkeys("abc", 4.0))) == [ROW]


def test_devices_that_wait_for_each_other_move_one_after_the_other() -> None:
    after: Spans = (("a", 0, 2), ("b", 2, 6), ("c", 6, 12))
    path = passed(ROW, after, holdings([1] * 12, {"a": 4.0, "b": 4.0, "c": 6.0}))
    assert path == [(("a", 0, 4), ("b", 4, 6), ("c", 6, 12)), after]


def test_a_device_that_leaves_is_not_used_on_the_way() -> None:
    after: Spans = (("a", 0, 6), ("c", 6, 12))
    room = holdings([1] * 12, {"a": 6.0, "b": 4.0, "c": 6.0})
    assert passed(ROW, after, room) == [after]
    swapped: Spans = (("c", 0, 4), ("a", 4, 12))
    path = passed(ROW, swapped, holdings([1] * 12, {"a": 12.0, "b": 12.0, "c": 4.0}))
    assert all(start >= 4 and end <= 8 for plan in path for name, start, end in plan if name == "b")


def test_a_device_that_joins_takes_what_others_wait_to_give() -> None:
    before: Spans = (("a", 0, 6), ("b", 6, 12))
    after: Spans = (("a", 0, 4), ("b", 4, 7), ("c", 7, 12))
    path = passed(before, after, holdings([1] * 12, {"a": 6.0, "b": 6.0, "c": 5.0}))
    assert len(path) == 2


def test_devices_change_places_where_one_of_them_has_room_first() -> None:
    after: Spans = (("b", 0, 4), ("a", 4, 8), ("c", 8, 12))
    path = passed(ROW, after, holdings([1] * 12, {"a": 4.0, "b": 8.0, "c": 4.0}))
    assert path == [(("b", 0, 8), ("c", 8, 12)), after]


@pytest.mark.parametrize("names", ["abc", "abcd"])
def test_an_idle_device_holds_nothing_for_others(names: str) -> None:
    after: Spans = (("b", 0, 4), ("a", 4, 8), ("c", 8, 12))
    with pytest.raises(ll.InfeasiblePlanError, match=r"keep the devices in their order \(a, b, c\)"):
        passed(ROW, after, holdings([1] * 12, dict.fromkeys(names, 4.0)))


def test_the_ends_of_a_ring_move_too() -> None:
    before: Spans = (("a", 0, 2), ("b", 2, 5), ("c", 5, 8), ("a", 8, 10))
    after: Spans = (("a", 0, 1), ("b", 1, 4), ("c", 4, 7), ("a", 7, 10))
    room = holdings([1] * 10, {"a": 4.0, "b": 3.0, "c": 4.0}, trusted="a")
    assert len(passed(before, after, room)) == 3
    with pytest.raises(ll.InfeasiblePlanError, match=r"'a' would hold 5 B of both plans and has 4 B: 1 B short"):
        passed(before, after, dataclasses.replace(room, capacity_bytes=(4.0, 3.0, 3.0)))
    turned: Spans = (("a", 0, 2), ("c", 2, 5), ("b", 5, 8), ("a", 8, 10))
    with pytest.raises(ll.InfeasiblePlanError, match=r"keep the devices in their order \(a, b, c\)"):
        passed(before, turned, dataclasses.replace(room, capacity_bytes=(7.0, 3.0, 3.0)))


def test_what_lies_around_the_layers_needs_room_too() -> None:
    before: Spans = (("a", 0, 4), ("b", 4, 8))
    after: Spans = (("b", 0, 4), ("a", 4, 8))
    layers = [1] * 8
    assert len(passed(before, after, holdings(layers, {"a": 14.0, "b": 14.0}, ends=(5, 3, 2)))) == 1
    assert len(passed(before, after, holdings(layers, {"a": 14.0, "b": 13.0}, ends=(5, 3, 2), trusted="ab"))) > 1


def test_a_device_that_is_over_its_limit_can_give_layers_away() -> None:
    after: Spans = (("a", 0, 4), ("b", 4, 6), ("c", 6, 12))
    assert passed(ROW, after, holdings([1] * 12, {"a": 4.0, "b": 3.0, "c": 9.0})) == [after]


def test_a_plan_that_does_not_fit_is_refused() -> None:
    after: Spans = (("a", 0, 4), ("b", 4, 6), ("c", 6, 12))
    room = holdings([10] * 12, {"a": 40.0, "b": 40.0, "c": 55.0}, kv=[1] * 12)
    with pytest.raises(ll.InfeasiblePlanError, match=r"66 B .* on device 'c', which has 55 B: 11 B short"):
        transition(ll.Plan.from_spans(ROW), ll.Plan.from_spans(after), room)
    with pytest.raises(ll.InfeasiblePlanError, match="device 'd'"):
        transition(ll.Plan.from_spans(ROW), ll.Plan.from_spans([("d", 0, 12)]), room)


def test_full_devices_can_not_change_places() -> None:
    after: Spans = (("b", 0, 4), ("a", 4, 8), ("c", 8, 12))
    with pytest.raises(ll.InfeasiblePlanError, match=r"device '[ab]' would hold 8 B.*4 B short") as caught:
        passed(ROW, after, holdings([1] * 12, dict.fromkeys("abc", 4.0)))
    assert caught.value.missing_bytes == 4


def test_memory_as_a_profile_says_it() -> None:
    devices = [ll.Device(name=name, memory=f"{size}MiB") for name, size in (("a", 60), ("b", 45), ("c", 80))]
    measured, workload = profile(*devices), ll.Workload(prompt_tokens=64, new_tokens=64, num_sessions=4)
    room = Holdings.of_profile(measured, workload)
    assert room.capacity_bytes == (60 * MIB, 45 * MIB, 80 * MIB)
    assert room.layer_kv == (4 * 128 * 1024,) * 8
    before = ll.Plan.from_spans([("a", 0, 3), ("b", 3, 6), ("c", 6, 8)], profile=measured, workload=workload)
    after = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 4), ("c", 4, 8)], profile=measured, workload=workload)
    plans = transition(before, after, room)
    assert len(plans) == 2
    assert plans[0].profile is measured
    assert plans[0].workload is workload


def test_memory_as_devices_say_it() -> None:
    weights = WeightBytes(layers=(10,) * 4, prologue=0, epilogue=0)
    room = Holdings.of_devices(weights, [ll.Device(name="a", memory=40), ll.Device(name="b")])
    assert room.capacity_bytes == (40, math.inf)


def test_a_large_model_on_many_devices() -> None:
    names = [f"d{index}" for index in range(8)]
    before: Spans = tuple((name, 10 * index, 10 * index + 10) for index, name in enumerate(names))
    ends = [0, 4, 18, 25, 40, 43, 60, 70, 80]
    after: Spans = tuple((name, ends[index], ends[index + 1]) for index, name in enumerate(names))
    for capacity, at_most in ((1750.0, 3), (2600.0, 2), (4000.0, 1)):
        room = holdings([100] * 80, dict.fromkeys(names, capacity), ends=(150, 150, 0), kv=[1] * 80, working=5)
        assert len(passed(before, after, room)) <= at_most


def test_two_orders_are_merged() -> None:
    slots, first, second = merged("abcd", "axcbd")
    assert [slots[index] for index in first] == list("abcd")
    assert [slots[index] for index in second] == list("axcbd")
    assert len(slots) == 6

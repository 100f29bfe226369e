"""A plan is a contiguous assignment of layers to devices, and nothing else gets to be one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, strategies as st

import lingualinked as ll
from lingualinked.planning.plan import check_plan
from lingualinked.planning.plan_checks import check_memory, check_trust

Spans = list[tuple[str, int, int]]


@st.composite
def plans(draw: st.DrawFn) -> ll.Plan:
    cuts = sorted(draw(st.sets(st.integers(1, 80), min_size=1, max_size=6)))
    names = draw(st.lists(st.text(min_size=1), min_size=len(cuts), max_size=len(cuts), unique=True))
    stages = tuple(
        ll.PlannedStage(device=name, start=start, end=end, weight_bytes=draw(st.integers(0, 2**50)))
        for name, (start, end) in zip(names, itertools.pairwise([0, *cuts]), strict=True)
    )
    return ll.Plan(stages=stages, inexact_because=draw(st.sampled_from(["", "mixed accelerators"])))


@given(plan=plans())
def test_json_gives_the_plan_back(plan: ll.Plan) -> None:
    assert ll.Plan.from_json(plan.to_json()) == plan


@given(plan=plans())
def test_every_layer_has_one_place(plan: ll.Plan) -> None:
    assert [layer for stage in plan.stages for layer in range(stage.start, stage.end)] == list(range(plan.num_layers))
    assert sum(stage.num_layers for stage in plan.stages) == plan.num_layers
    assert plan.devices == tuple(stage.device for stage in plan.stages)


def test_a_device_may_hold_both_ends() -> None:
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 5), ("a", 5, 6)])
    assert plan.devices == ("a", "b")
    assert plan.num_layers == 6
    assert plan.exact


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([], "at least one stage"),
        ([("a", 1, 4)], "must start at layer 0"),
        ([("a", 0, 2), ("b", 3, 4)], "must start at layer 2"),
        ([("a", 0, 2), ("b", 1, 4)], "must start at layer 2"),
        ([("a", 0, 0)], "at least one layer"),
        ([("a", 0, 2), ("b", 2, 1)], "at least one layer"),
        ([("a", 0, 2.0)], "integers"),
        ([("a", "0", 2)], "integers"),
        ([("a", 0, 1), ("a", 1, 2), ("b", 2, 3)], "'a' holds stages"),
        ([("b", 0, 1), ("a", 1, 2), ("a", 2, 3)], "'a' holds stages"),
    ],
)
def test_what_is_no_plan(spans: Any, reason: str) -> None:
    with pytest.raises(ll.ArgumentError, match=reason):
        ll.Plan.from_spans(spans)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"stages": []}',
        '{"stages": [{"device": "a", "start": 0, "end": "4"}]}',
        '{"stages": [{"device": "a", "start": 1, "end": 4}]}',
    ],
)
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(ll.ArgumentError, match="plan"):
        ll.Plan.from_json(text)


def test_a_plan_must_be_one_for_the_model_and_the_cluster() -> None:
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    check_plan(plan, 4, ["a", "b", "c"])
    with pytest.raises(ll.InfeasiblePlanError, match="places 4 layers, the model has 5"):
        check_plan(plan, 5, ["a", "b"])
    with pytest.raises(ll.InfeasiblePlanError, match="'b'"):
        check_plan(plan, 4, ["a", "c"])


def test_both_stages_of_a_device_count_against_its_memory() -> None:
    stages = [("a", 0, 1, 60), ("b", 1, 2, 1000), ("a", 2, 3, 50)]
    plan = ll.Plan(
        stages=tuple(
            ll.PlannedStage(device=name, start=start, end=end, weight_bytes=size) for name, start, end, size in stages
        )
    )
    check_memory(plan, [ll.Device(name="a", memory=110), ll.Device(name="b")])
    with pytest.raises(ll.InfeasiblePlanError, match=r"device 'a'.*10 B short") as caught:
        check_memory(plan, [ll.Device(name="a", memory=100), ll.Device(name="b")])
    assert caught.value.missing_bytes == 10


@pytest.mark.parametrize(
    ("kept", "spans", "refused"),
    [
        ((0, 0), [("mine", 0, 1), ("theirs", 1, 7), ("mine", 7, 8)], ""),
        ((0, 0), [("theirs", 0, 1), ("mine", 1, 8)], r"\[0, 1\) on device 'theirs'"),
        ((0, 0), [("mine", 0, 1), ("theirs", 1, 8)], r"\[1, 8\) on device 'theirs'"),
        ((2, 3), [("mine", 0, 2), ("theirs", 2, 5), ("mine", 5, 8)], ""),
        ((2, 3), [("mine", 0, 1), ("theirs", 1, 5), ("mine", 5, 8)], r"\[1, 5\).*trusted_layers=\(2, 3\)"),
        ((2, 3), [("mine", 0, 2), ("theirs", 2, 6), ("mine", 6, 8)], r"\[2, 6\).*trusted_layers=\(2, 3\)"),
    ],
)
def test_ends_on_devices_that_are_not_trusted_are_refused(kept: tuple[int, int], spans: Spans, refused: str) -> None:
    devices = [ll.Device(name="mine", trusted=True), ll.Device(name="theirs")]
    plan = ll.Plan.from_spans(spans, workload=ll.Workload(trusted_layers=kept))
    if refused:
        with pytest.raises(ll.InfeasiblePlanError, match=refused):
            check_trust(plan, devices)
    else:
        check_trust(plan, devices)
    nobody = [ll.Device(name="mine"), ll.Device(name="theirs")]
    if any(kept):
        with pytest.raises(ll.ArgumentError, match="no device is trusted"):
            check_trust(plan, nobody)
    else:
        check_trust(plan, nobody)

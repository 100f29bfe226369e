"""The even split is the best of all contiguous ones, as trying every one of them shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

import lingualinked as ll
from lingualinked.environment import inexact_because
from lingualinked.planning.even import even_plan
from lingualinked.weight_bytes import WeightBytes

SIZES = st.integers(1, 50)


@st.composite
def weights(draw: st.DrawFn) -> WeightBytes:
    prologue, epilogue = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    return WeightBytes(
        layers=tuple(draw(st.lists(SIZES, min_size=1, max_size=7))),
        prologue=prologue,
        epilogue=epilogue,
        tied=draw(st.integers(0, min(prologue, epilogue))),
    )


def devices_of(limits: Sequence[int | None]) -> list[ll.Device]:
    return [ll.Device(name=f"d{index}", memory=limit) for index, limit in enumerate(limits)]


def all_splits(num_layers: int, num_devices: int) -> list[list[tuple[int, int]]]:
    return [
        list(itertools.pairwise([0, *cuts, num_layers]))
        for cuts in itertools.combinations(range(1, num_layers), num_devices - 1)
    ]


def stage_bytes(weights: WeightBytes, start: int, end: int) -> int:
    """What a stage holds, counted tensor by tensor."""
    held = sum(weights.layers[start:end])
    if start == 0:
        held += weights.prologue
    if end == len(weights.layers):
        held += weights.epilogue - (weights.tied if start == 0 else 0)
    return held


def fits(size: int, limit: int | None) -> bool:
    return limit is None or size <= limit


def missing(size: int, limit: int | None) -> int:
    return 0 if limit is None else max(0, size - limit)


@given(weights=weights(), limits=st.lists(st.none() | st.integers(1, 250), min_size=1, max_size=5))
def test_no_split_that_fits_has_a_smaller_largest_stage(weights: WeightBytes, limits: list[int | None]) -> None:
    splits = all_splits(len(weights.layers), len(limits))
    sizes = [[stage_bytes(weights, *span) for span in split] for split in splits]
    largest = [max(each) for each in sizes if all(map(fits, each, limits))]
    if not largest:
        with pytest.raises(ll.InfeasiblePlanError) as caught:
            even_plan(weights, devices_of(limits))
        # No split comes closer than the one that the message tells of; what it says of one device or of all is a bound.
        excess = min((max(map(missing, each, limits)) for each in sizes), default=0)
        told = caught.value.missing_bytes
        assert (told == excess) if "closest" in str(caught.value) else (told > 0) == bool(splits)
        return
    plan = even_plan(weights, devices_of(limits))
    assert plan.num_layers == len(weights.layers)
    assert plan.devices == tuple(device.name for device in devices_of(limits))
    planned = [stage.weight_bytes for stage in plan.stages]
    assert planned == [stage_bytes(weights, stage.start, stage.end) for stage in plan.stages]
    assert all(map(fits, planned, limits))
    assert max(planned) == min(largest)


@given(weights=weights(), limits=st.lists(st.none() | st.integers(1, 250), min_size=1, max_size=4), data=st.data())
def test_no_allowed_split_has_a_smaller_largest_stage(
    weights: WeightBytes, limits: list[int | None], data: st.DataObject
) -> None:
    num_layers = len(weights.layers)
    cuts = data.draw(st.sets(st.integers(1, max(1, num_layers - 1)), max_size=3)) if num_layers > 1 else set()
    splits = [each for each in all_splits(num_layers, len(limits)) if not {start for start, _ in each} & cuts]
    sizes = [[stage_bytes(weights, *span) for span in split] for split in splits]
    largest = [max(each) for each in sizes if all(map(fits, each, limits))]
    if not largest:
        with pytest.raises(ll.InfeasiblePlanError, match="short" if splits else "stages? for"):
            even_plan(weights, devices_of(limits), sorted(cuts))
        return
    plan = even_plan(weights, devices_of(limits), sorted(cuts))
    assert max(stage.weight_bytes for stage in plan.stages) == min(largest)
    assert not {stage.start for stage in plan.stages} & cuts


@given(weights=weights())
def test_bytes_of_a_span(weights: WeightBytes) -> None:
    for start, end in itertools.combinations(range(len(weights.layers) + 1), 2):
        assert weights.of_span(start, end) == stage_bytes(weights, start, end)


def test_equal_layers_leave_none_over() -> None:
    plan = even_plan(WeightBytes(layers=(10,) * 61, prologue=0, epilogue=0), devices_of([None, None]))
    assert [stage.num_layers for stage in plan.stages] in ([30, 31], [31, 30])


def test_hundreds_of_layers_are_placed_at_once() -> None:
    plan = even_plan(WeightBytes(layers=(7,) * 256, prologue=90, epilogue=90), devices_of([None] * 16))
    assert plan.num_layers == 256


@pytest.mark.parametrize(
    ("limits", "missing_bytes", "words"),
    [
        ([None] * 5, 0, "5 stages for 4 layers.*at most 4 devices"),
        ([None, 7], 3, "device 'd1' has 7 B.*smallest layer takes 10 B: 3 B short"),
        ([30, 30], 20, "the weights take 80 B and 2 devices offer 60 B: 20 B short"),
        ([15, None], 15, "device 'd0' is 15 B short"),  # its one layer and the prologue: 30
    ],
)
def test_what_does_not_fit_is_told_in_bytes(limits: list[int | None], missing_bytes: int, words: str) -> None:
    with pytest.raises(ll.InfeasiblePlanError, match=words) as caught:
        even_plan(WeightBytes(layers=(10,) * 4, prologue=20, epilogue=20), devices_of(limits))
    assert caught.value.missing_bytes == missing_bytes


def test_why_a_placement_is_not_exact() -> None:
    one, two = ll.Device(name="a", threads=1), ll.Device(name="b", threads=2)
    gpu = ll.Device(name="c", accelerator="cuda:0", threads=2)
    assert inexact_because([one, one]) == ""
    assert "1, 2" in inexact_because([one, two])
    assert "cpu, cuda" in inexact_because([one, gpu])
    assert inexact_because([gpu, ll.Device(name="d", accelerator="cuda:1", threads=8)]) == ""
    assert not even_plan(WeightBytes(layers=(1, 1), prologue=0, epilogue=0), [one, two]).exact

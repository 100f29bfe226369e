"""How long a batch takes as several microbatches, and how many of them are fastest."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import lingualinked as ll
from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.planning.microbatches import exact_numbers, lockstep_s, split_rows
from lingualinked.planning.prediction import Prediction
from lingualinked.rounding import Rounding
from profiles import profile

WORKLOAD = ll.Workload(prompt_tokens=16, new_tokens=11)


def plan(
    num_stages: int, *, row_s: float, fixed_s: float, rows: tuple[int, ...] = (1, 16), independent_rows: int = 2
) -> ll.Plan:
    """Equal stages on devices of which each layer takes so long a row beside a fixed time, in a prefill and in a decode step."""
    devices = [ll.Device(name=f"device-{index}") for index in range(num_stages)]
    known = profile(*devices, num_layers=num_stages, latency_s=0.0)
    steps = [
        StepTime(rows=each, tokens=tokens, context=0, seconds=fixed_s + row_s * each)
        for each in rows
        for tokens in (1, 16)
    ]
    nothing = ModuleTimes((StepTime(rows=1, tokens=1, context=0, seconds=0.0),))
    known = dataclasses.replace(
        known,
        devices=tuple(
            dataclasses.replace(
                each,
                layers=(ModuleTimes(tuple(steps)),),
                stage=nothing,
                prologue=nothing,
                epilogue=nothing,
                rounding=Rounding("same", independent_rows),
            )
            for each in known.devices
        ),
        links=tuple(dataclasses.replace(each, latency_s=0.0, bandwidth_bytes_per_s=None) for each in known.links),
    )
    spans = [(device.name, index, index + 1) for index, device in enumerate(devices)]
    return ll.Plan.from_spans(spans, profile=known, workload=WORKLOAD)


def predict(made: ll.Plan, number: int, num_sessions: int = 1) -> Prediction:
    return made.predict(
        dataclasses.replace(WORKLOAD, batch_size=16, num_microbatches=number, num_sessions=num_sessions)
    )


@pytest.mark.parametrize(("rows", "number", "together", "sizes"), [
    (8, 2, 1, (4, 4)), (7, 3, 1, (2, 2, 3)), (12, 2, 4, (4, 8)), (12, 3, 4, (4, 4, 4)), (5, 1, 1, (5,)),
])  # fmt: skip
def test_rows_are_split_evenly_and_beams_stay_together(
    rows: int, number: int, together: int, sizes: tuple[int, ...]
) -> None:
    assert split_rows(rows, number, together) == sizes


def test_microbatches_follow_each_other_through_the_stages() -> None:
    made = plan(2, row_s=0.0, fixed_s=1.0)
    whole, halves = predict(made, 1), predict(made, 2)
    assert (whole.first_token_s, whole.request_s) == (2, 11 * 2)
    assert (halves.first_token_s, halves.request_s) == (3, 3 + 10 * 2)
    assert (whole.bottleneck_s, halves.bottleneck_s) == (1, 2)  # all devices are busy all the time
    assert (lockstep_s(whole), lockstep_s(halves)) == (11 * 2, 11 * 3)  # the pipeline fills and drains with every token


def test_other_batches_in_flight_keep_devices_busy() -> None:
    made = plan(2, row_s=0.0, fixed_s=1.0)
    assert predict(made, 1, num_sessions=4).interval_s == 1
    assert predict(made, 2, num_sessions=4).interval_s == 2


@pytest.mark.parametrize(("row_s", "fixed_s", "num_sessions", "best"), [
    (1.0, 0.0, 1, 8),  # all of the time is for rows: the more, the sooner the pipeline is full
    (1.0, 16.0, 1, 2),  # each reads the weights anew: as many as keep both devices busy
    (1.0, 16.0, 4, 1),  # other sessions fill the pipeline
])  # fmt: skip
def test_a_plan_is_predicted_in_the_best_number_that_changes_no_bit(
    row_s: float, fixed_s: float, num_sessions: int, best: int
) -> None:
    made = plan(2, row_s=row_s, fixed_s=fixed_s)
    batch = dataclasses.replace(WORKLOAD, batch_size=16, num_sessions=num_sessions)
    assert made.predict(batch).workload.num_microbatches == best
    solved = ll.solve(made.measured, workload=batch)
    assert solved.predicted.workload.num_microbatches == best
    assert solved.solved is not None
    assert solved.solved.value == pytest.approx(solved.predicted.interval_s)


@pytest.mark.parametrize("change", [{"rows": (1,)}, {"independent_rows": 0}], ids=str)
def test_what_rows_cost_and_what_their_bits_depend_on_must_be_known(change: dict[str, Any]) -> None:
    made = plan(2, row_s=1.0, fixed_s=1.0, **change)
    assert exact_numbers(made.measured, made.devices, dataclasses.replace(WORKLOAD, batch_size=16)) == [1]


def test_one_device_has_nothing_to_overlap() -> None:
    made = plan(1, row_s=1.0, fixed_s=1.0)
    assert exact_numbers(made.measured, made.devices, dataclasses.replace(WORKLOAD, batch_size=16)) == [1]


def test_a_workload_has_no_more_microbatches_than_rows() -> None:
    with pytest.raises(ll.ArgumentError, match="num_microbatches=3"):
        ll.Workload(batch_size=2, num_microbatches=3)

"""How long a batch takes as several microbatches, and how many of them are fastest."""

from __future__ import annotations

import dataclasses

import pytest

import lingualinked as ll
from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.planning.microbatches import batch_s, best_number, knows_rows, split_rows
from lingualinked.planning.prediction import Prediction
from profiles import profile

WORKLOAD = ll.Workload(prompt_tokens=16, new_tokens=11)


def plan(num_stages: int, *, row_s: float, fixed_s: float, rows: tuple[int, ...] = (1, 16)) -> ll.Plan:
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
                each, layers=(ModuleTimes(tuple(steps)),), stage=nothing, prologue=nothing, epilogue=nothing
            )
            for each in known.devices
        ),
        links=tuple(dataclasses.replace(each, latency_s=0.0, bandwidth_bytes_per_s=None) for each in known.links),
    )
    spans = [(device.name, index, index + 1) for index, device in enumerate(devices)]
    return ll.Plan.from_spans(spans, profile=known, workload=WORKLOAD)


def predict(made: ll.Plan, number: int) -> Prediction:
    return made.predict(dataclasses.replace(WORKLOAD, batch_size=16 // number))


@pytest.mark.parametrize(("rows", "number", "together", "sizes"), [
    (8, 2, 1, (4, 4)), (7, 3, 1, (2, 2, 3)), (12, 2, 4, (4, 8)), (12, 3, 4, (4, 4, 4)), (5, 1, 1, (5,)),
])  # fmt: skip
def test_rows_are_split_evenly_and_beams_stay_together(
    rows: int, number: int, together: int, sizes: tuple[int, ...]
) -> None:
    assert split_rows(rows, number, together) == sizes


def test_in_lockstep_the_pipeline_fills_and_drains_with_every_token() -> None:
    made = plan(2, row_s=0.0, fixed_s=1.0)
    assert batch_s(predict(made, 1), 1, in_lockstep=True) == pytest.approx(11 * 2)
    assert batch_s(predict(made, 2), 2, in_lockstep=True) == pytest.approx(11 * 3)
    assert batch_s(predict(made, 2), 2, in_lockstep=False) == pytest.approx(3 + 10 * 2)


def test_other_batches_in_flight_keep_devices_busy() -> None:
    made = plan(2, row_s=0.0, fixed_s=1.0)
    assert batch_s(predict(made, 1), 1, in_lockstep=True, num_sessions=4) == pytest.approx(11 * 4)


@pytest.mark.parametrize(("row_s", "fixed_s", "in_lockstep", "best"), [
    (1.0, 0.0, True, 16),  # all of the time is for rows: the more, the sooner the pipeline is full
    (0.0, 1.0, True, 1),  # all of it is for weights, which each microbatch reads anew
    (1.0, 16.0, False, 2),  # each goes on by itself: as many as keep both devices busy
    (1.0, 0.0, False, 16),
])  # fmt: skip
def test_the_best_number_depends_on_what_rows_cost(row_s: float, fixed_s: float, in_lockstep: bool, best: int) -> None:
    made = plan(2, row_s=row_s, fixed_s=fixed_s)
    found = best_number((1, 2, 4, 8, 16), lambda number: predict(made, number), in_lockstep=in_lockstep)
    assert found == best


def test_a_pipeline_that_other_batches_fill_gains_nothing() -> None:
    made = plan(2, row_s=1.0, fixed_s=16.0)
    assert best_number((1, 2, 4), lambda number: predict(made, number), num_sessions=4) == 1


def test_a_profile_of_one_number_of_rows_does_not_know_what_rows_cost() -> None:
    assert not knows_rows(plan(2, row_s=0.0, fixed_s=1.0, rows=(1,)).measured)
    assert knows_rows(plan(2, row_s=0.0, fixed_s=1.0).measured)

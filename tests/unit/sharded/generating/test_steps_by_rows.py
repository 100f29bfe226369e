"""Without a profile of several rows, recorded steps tell how many microbatches of a batch are fastest."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

import lingualinked as ll
from histories import timing
from lingualinked.sharded.generating.microbatching import Batch
from lingualinked.sharded.generating.steps_by_rows import StepsByRows
from lingualinked.telemetry.samples import StepSample

PLAN = ll.Plan.from_spans([("a", 0, 4), ("b", 4, 8)])
BATCH = Batch(num_rows=16, num_together=1, mask=None, prompt_tokens=4, new_tokens=8)


def steps(rows: int, seconds: float, number: int = 8, tokens: int = 1) -> list[StepSample]:
    """Steps that take so long in each of two stages."""
    sample = StepSample(
        time_s=0.0,
        session=1,
        number=0,
        plan_version=1,
        rows=rows,
        tokens=tokens,
        context=9,
        total_s=2 * seconds,
        stages=tuple(
            timing(device=each.device, start=each.start, end=each.end, compute_s=seconds, hop_s=0.0, codec_s=0.0)
            for each in PLAN.stages
        ),
    )
    return [sample] * number


def pipeline(seen: list[StepSample], num_sessions: int = 0) -> Any:
    return SimpleNamespace(plan=PLAN, independent_rows=2, num_sessions_in_use=num_sessions, latest_steps=lambda: seen)


@pytest.mark.parametrize(
    ("seen", "num_sessions", "in_lockstep", "number"),
    [
        ([], 0, False, 2),  # a rule: as many as devices
        ([], 0, True, 1),
        (steps(16, 1.6), 0, False, 2),  # one number of rows says nothing of another
        (steps(16, 1.6) + steps(1, 0.1, number=7), 0, False, 2),  # too few
        (steps(16, 1.6) + steps(1, 0.1), 0, True, 8),  # all time is for rows: the more, the less of it others wait
        (steps(16, 1.1) + steps(1, 1.0), 0, True, 1),  # each reads the weights anew, and all wait for the last
        (steps(16, 1.1) + steps(1, 1.0), 0, False, 2),  # as many as keep both devices busy
        (steps(16, 1.1) + steps(1, 1.0), 1, False, 1),  # another call keeps them busy
    ],
)
def test_steps_so_far_decide(seen: list[StepSample], num_sessions: int, in_lockstep: bool, number: int) -> None:
    assert len(BATCH.split_best(pipeline(seen, num_sessions), in_lockstep=in_lockstep)) == number


def test_only_decode_steps_through_these_stages_count() -> None:
    seen = steps(16, 1.6) + steps(1, 0.1)
    known = StepsByRows.of(seen, PLAN.spans)
    assert known is not None
    assert known.token_s((8, 8), 1, in_lockstep=False) == pytest.approx(1.6)
    assert known.token_s((8, 8), 1, in_lockstep=True) == pytest.approx(2.4)
    assert known.token_s((16,), 3, in_lockstep=False) == pytest.approx(
        1.6
    )  # the device is busy for each of three calls
    assert StepsByRows.of(seen, (("a", 0, 8),)) is None
    assert StepsByRows.of([dataclasses.replace(each, tokens=2) for each in seen], PLAN.spans) is None

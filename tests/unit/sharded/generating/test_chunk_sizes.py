"""What a prompt's chunks are chosen by: a profile, or the steps that have been recorded, or what is usual."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import lingualinked as ll
from histories import timing
from lingualinked.sharded.generating.chunk_sizes import ChunkSizes, stage_times
from lingualinked.telemetry.samples import StepSample
from profiles import profile

PLAN = ll.Plan.from_spans([("a", 0, 4), ("b", 4, 8)])


def step(tokens: int, context: int, *compute_s: float, rows: int = 1) -> StepSample:
    stages = tuple(
        timing(device=stage.device, start=stage.start, end=stage.end, compute_s=seconds)
        for stage, seconds in zip(PLAN.stages, compute_s, strict=True)
    )
    return StepSample(
        time_s=0.0,
        session=1,
        number=0,
        plan_version=1,
        rows=rows,
        tokens=tokens,
        context=context,
        total_s=sum(compute_s),
        stages=stages,
    )


def pipeline(
    steps: list[StepSample] | None = None, measured: ll.Profile | None = None, accelerator: str = "cpu"
) -> Any:
    cluster = SimpleNamespace(device=lambda _: SimpleNamespace(accelerator=accelerator))
    return SimpleNamespace(plan=PLAN, profile=measured, cluster=cluster, latest_steps=lambda: steps or [])


def test_steps_tell_what_chunks_cost() -> None:
    steps = [step(64, 0, 0.7, 1.4), step(64, 64, 0.8, 1.6), step(1, 128, 0.1, 0.2), step(64, 0, 9.0, 9.0, rows=2)]
    first, second = stage_times(steps, PLAN.spans, 1) or ()
    assert first.seconds(1, 64, 128) == pytest.approx(0.9)
    assert second.seconds(1, 64, 128) == pytest.approx(1.8)
    assert stage_times(steps[2:3], PLAN.spans, 1) is None
    assert stage_times(steps[:2], PLAN.spans, 1) is None  # nothing says what a chunk costs beside its tokens
    assert stage_times(steps, (("a", 0, 8),), 1) is None


def test_a_size_stays_until_the_plan_changes() -> None:
    known = pipeline()
    sizes = ChunkSizes(known)
    usual = sizes.choose(1, 1000)
    assert 64 <= usual <= 192
    known.latest_steps = lambda: [step(1, 0, 2.0, 2.0), step(100, 0, 2.1, 2.1)]  # a chunk costs more than its tokens
    assert sizes.choose(1, 1020) == usual
    assert ChunkSizes(known).choose(1, 1000) == 1024
    known.plan = ll.Plan.from_spans([("a", 0, 4), ("b", 4, 7), ("c", 7, 8)])
    assert sizes.choose(1, 1000) != 0


def test_a_profile_comes_first_and_a_gpu_has_long_chunks() -> None:
    steps = [step(1, 0, 2.0, 2.0), step(100, 0, 2.1, 2.1)]
    assert ChunkSizes(pipeline(steps, profile())).choose(1, 1000) == 32  # no chunk costs anything of its own there
    assert ChunkSizes(pipeline(accelerator="cuda:0")).choose(1, 1000) == 1024
    assert 512 < ChunkSizes(pipeline(accelerator="cuda:0")).choose(1, 32_000) < 8192

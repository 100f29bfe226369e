"""When stages were busy follows from durations alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from histories import START_S, recorded, step, timing
from lingualinked.telemetry.samples import StepSample
from lingualinked.telemetry.timeline import compute_of, stage_intervals, windows_of

seconds = st.floats(min_value=0, max_value=10)


def step_of(*stages: object, total_s: float) -> StepSample:
    return StepSample(
        time_s=START_S,
        session=1,
        number=0,
        plan_version=1,
        rows=1,
        tokens=1,
        context=0,
        total_s=total_s,
        stages=stages,  # type: ignore[arg-type]
    )


def test_durations_are_laid_end_to_end() -> None:
    first, second = stage_intervals(step())
    assert first[1:] == pytest.approx((START_S + 0.001, START_S + 0.003, START_S + 0.0135))
    assert second[1:] == pytest.approx((START_S + 0.0145, START_S + 0.0165, START_S + 0.037))


@given(
    st.lists(st.builds(timing, hop_s=seconds, wait_s=seconds, compute_s=seconds, codec_s=seconds), max_size=4),
    seconds,
)
def test_stages_never_outlast_their_step(stages: list[object], total_s: float) -> None:
    now_s = START_S
    for interval in stage_intervals(step_of(*stages, total_s=total_s)):
        assert now_s <= interval.arrival_s <= interval.start_s <= interval.end_s
        now_s = interval.end_s
    assert now_s <= START_S + total_s + 1e-9


def test_windows_share_out_tokens_and_time() -> None:
    windows = windows_of([step(total_s=1.0), step(START_S + 1, number=1, total_s=1.0)], START_S, START_S + 2, 4)
    assert windows.edges_s == pytest.approx([START_S, START_S + 0.5, START_S + 1, START_S + 1.5, START_S + 2])
    assert windows.tokens_per_s == pytest.approx([1.0] * 4)
    assert windows.utilisation["a"] == pytest.approx([0.021, 0, 0.021, 0])
    assert math.isnan(windows.compute_s["a"][0])
    assert windows.compute_s["a"][2:] == pytest.approx((0.01, 0.01))


def test_windows_leave_out_what_lies_outside() -> None:
    windows = windows_of([step(total_s=1.0)], START_S + 5, START_S + 6, 2)
    assert windows.tokens_per_s == (0.0, 0.0)
    assert windows.utilisation["a"] == (0.0, 0.0)


@given(st.integers(1, 40), st.integers(1, 50))
def test_windows_neither_lose_nor_invent_tokens(num_steps: int, num_windows: int) -> None:
    history = recorded(num_steps)
    first_s = min(each.time_s for each in history.steps)
    windows = windows_of(history.steps, first_s, history.end_s, num_windows)
    width_s = (history.end_s - first_s) / num_windows
    decoded = [each for each in history.steps if each.is_decode] or history.steps
    expected = sum(each.rows * each.tokens for each in decoded)
    assert sum(windows.tokens_per_s) * width_s == pytest.approx(expected)
    assert all(0 <= share <= 1 for row in windows.utilisation.values() for share in row)


def test_a_device_with_two_stages_computes_in_both() -> None:
    assert compute_of(step_of(timing("a"), timing("b"), timing("a"), total_s=1.0)) == {
        "a": pytest.approx(0.02),
        "b": pytest.approx(0.01),
    }

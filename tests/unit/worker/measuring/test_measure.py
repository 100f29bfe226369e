"""Steps are repeated until their time is known, within bounds."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from lingualinked.worker.measuring import measure
from lingualinked.worker.measuring.measure import Measurer, repeat_step
from lingualinked.worker.steps.pace import Pace


class Steps:
    """Steps that take these times on a fake clock; the last time repeats."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)
        self.now_s = 0.0

    def __call__(self) -> dict[measure.Part, float]:
        seconds = self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]
        self.now_s += seconds
        return {0: seconds / 2, "stage": seconds / 2}

    def monotonic(self) -> float:
        return self.now_s


def repeated(monkeypatch: pytest.MonkeyPatch, *seconds: float, num_wanted: int = 5) -> list[float]:
    steps = Steps(*seconds)
    monkeypatch.setattr(measure, "time", steps)
    return [sum(sample.values()) for sample in repeat_step(steps, num_wanted)]


def test_the_first_does_not_count_and_steady_ones_are_repeated_as_often_as_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert repeated(monkeypatch, 0.5, 0.01) == [0.01] * 5


def test_steps_that_spread_are_repeated_further_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady = [0.01, 0.04] * 10
    assert len(repeated(monkeypatch, 0.5, *unsteady)) == 10
    # A machine that is busy at first: the quiet ones outvote the others.
    assert repeated(monkeypatch, 0.5, 0.04, 0.04, 0.04, 0.01) == [0.04] * 3 + [0.01] * 7
    assert len(repeated(monkeypatch, 0.5, *[1e-5, 4e-5] * 10)) == 5  # microseconds do not matter


@pytest.mark.parametrize(("seconds", "num"), [(0.1, 5), (0.3, 3), (0.6, 2), (1.5, 2), (60.0, 2)], ids=str)
def test_long_steps_are_repeated_less_often_but_never_measured_once(
    monkeypatch: pytest.MonkeyPatch, seconds: float, num: int
) -> None:
    assert repeated(monkeypatch, seconds) == [seconds] * num


def test_the_first_of_very_long_ones_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeated(monkeypatch, 70.0, 60.0, 50.0) == [70.0, 60.0]


def test_what_measured_is_freed_at_once() -> None:
    """It holds 64 MiB, which a worker would be said to need."""
    request: Any = SimpleNamespace(spans=((0, 1),), kind_of_layer=(0,), shapes=())
    measurer = Measurer(request, "cpu", Pace(1, 1.0), lambda num_done: None)
    freed = weakref.ref(measurer)
    gc.disable()
    try:
        del measurer
        assert freed() is None
    finally:
        gc.enable()

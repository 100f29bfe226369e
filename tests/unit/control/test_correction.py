"""A doubtful profile follows the first steps; one that is not doubtful waits until they have settled."""

from __future__ import annotations

import dataclasses

import pytest

import lingualinked as ll
from histories import timing
from lingualinked.control.correction import Correction
from lingualinked.control.live_profile import LiveProfile
from lingualinked.planning.workload_costs import stage_s
from lingualinked.profile import Profile
from lingualinked.telemetry.samples import StepSample
from profiles import profile

MADE = profile(ll.Device(name="a"), ll.Device(name="b"), ll.Device(name="c"), num_layers=8)
DOUBTFUL = dataclasses.replace(MADE, doubt="the machine was busy")


def step(number: int, *, slowdown: float, tokens: int = 1) -> StepSample:
    """A step through layers 0 to 4 on a and 4 to 8 on b, so many times as long as the profile says."""

    def compute_s(device: str, start: int, end: int) -> float:
        return slowdown * stage_s(MADE.model, MADE.device(device), start, end, 1, tokens, 100)

    return StepSample(
        time_s=float(number),
        session=1,
        number=number,
        plan_version=1,
        rows=1,
        tokens=tokens,
        context=100,
        total_s=0.1,
        stages=(
            timing("a", 0, 4, compute_s=compute_s("a", 0, 4)),
            timing("b", 4, 8, compute_s=compute_s("b", 4, 8)),
        ),
    )


def layer_s(corrected: Profile, device: str, tokens: int) -> float:
    return corrected.device(device).layers[0].seconds(1, tokens, 100)


def test_one_request_corrects_prefill_and_decode_each_by_its_own_steps() -> None:
    """The prefill was measured 40 times too long, decode steps 1.8 times; the request has one prefill."""
    correction = Correction(DOUBTFUL)
    corrected = correction.observe(2, [step(0, slowdown=1 / 40, tokens=64), step(1, slowdown=1 / 1.8)])
    for device in "ab":
        assert layer_s(corrected, device, 64) == pytest.approx(layer_s(MADE, device, 64) / 40)
        assert layer_s(corrected, device, 1) == pytest.approx(layer_s(MADE, device, 1) / 1.8)
    assert corrected.doubt == "the machine was busy"  # from two steps nothing is settled


def test_the_doubt_ends_with_the_last_device_that_has_run_enough_steps() -> None:
    correction = Correction(DOUBTFUL)
    corrected = correction.observe(20, [step(number, slowdown=0.5) for number in range(20)])
    assert corrected.doubt == "the machine was busy; steps have corrected a, b since"
    assert layer_s(corrected, "c", 1) == pytest.approx(layer_s(MADE, "c", 1) / 2)  # as the others that are like it
    both = Correction(DOUBTFUL.without("c")).observe(20, [step(number, slowdown=0.5) for number in range(20)])
    assert both.doubt == ""


def test_steps_count_once_whoever_asks() -> None:
    """Two threads ask at once: the second one's steps have in part been told by the first."""
    steps = [step(number, slowdown=0.5) for number in range(12)]
    correction = Correction(DOUBTFUL)
    first = correction.observe(12, steps)
    assert correction.observe(12, steps) is first
    assert correction.observe(8, steps[:8]) is first
    assert correction.observe(13, [*steps[6:], step(12, slowdown=0.5)]) is not first
    assert correction.num_steps == 13
    assert correction._live["a"].decode.num_samples == 13


def test_a_profile_without_doubt_is_not_corrected_by_single_steps() -> None:
    live = LiveProfile(MADE, confidence=5.0, horizon_s=60.0)
    live.observe(step(0, slowdown=40.0, tokens=64))
    for number in range(1, 10):
        live.observe(step(number, slowdown=1.0))
    assert layer_s(live.profile(), "a", 64) == pytest.approx(layer_s(MADE, "a", 64))
    assert live.profile().doubt == ""

"""A device's level holds under noise and outliers, and follows what has plainly changed at once."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lingualinked.control.speed import SpeedLevel

Noise = Callable[[random.Random], float]
NOISES: dict[str, Noise] = {
    "none": lambda rng: 1.0,
    "3 %": lambda rng: max(0.5, rng.gauss(1, 0.03)),
    "20 %, uniform": lambda rng: rng.uniform(0.8, 1.2),
    "20 %, normal": lambda rng: max(0.3, rng.gauss(1, 0.2)),
}


def feed(level: SpeedLevel, slowdown: float, num: int, noise: Noise, rng: random.Random, start: int = 0) -> list[int]:
    """Play steps, one a second; give those at which the level shifted."""
    return [step for step in range(start, start + num) if level.add(step, slowdown * noise(rng), 1.0)]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seed", range(4))
def test_noise_shifts_nothing(noise: str, seed: int) -> None:
    level = SpeedLevel(5.0)
    assert feed(level, 1.1, 5000, NOISES[noise], random.Random(seed)) == []
    assert level.slowdown == pytest.approx(1.1, rel=0.12)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_a_large_change_shows_within_a_few_steps(noise: str, seed: int, factor: float) -> None:
    level, rng = SpeedLevel(5.0), random.Random(seed)
    feed(level, 2.0, 200, NOISES[noise], rng)
    first, *_ = feed(level, 2.0 * factor, 40, NOISES[noise], rng, 200)
    assert first - 200 < 8
    assert level.slowdown == pytest.approx(2.0 * factor, rel=0.15)


def test_a_small_change_shows_where_there_is_little_noise() -> None:
    level, rng = SpeedLevel(5.0), random.Random(0)
    feed(level, 1.0, 100, NOISES["3 %"], rng)
    assert feed(level, 1.2, 20, NOISES["3 %"], rng, 100)


@pytest.mark.parametrize("num_outliers", [1, 2])
def test_outliers_move_nothing(num_outliers: int) -> None:
    level, rng = SpeedLevel(5.0), random.Random(0)
    feed(level, 1.0, 50, NOISES["3 %"], rng)
    shifts = feed(level, 40.0, num_outliers, NOISES["none"], rng, 50)
    shifts += feed(level, 1.0, 50, NOISES["3 %"], rng, 60)
    assert shifts == []
    assert level.slowdown == pytest.approx(1.0, rel=0.03)


def test_a_first_step_that_is_slow_moves_nothing() -> None:
    level = SpeedLevel(5.0)
    level.add(0, 30.0, 1.0)
    assert feed(level, 1.0, 30, NOISES["3 %"], random.Random(0), 1) == []
    assert level.slowdown == pytest.approx(1.0, rel=0.03)


def test_a_speed_lasts_as_long_as_speeds_did_of_late() -> None:
    level, rng = SpeedLevel(5.0), random.Random(0)
    feed(level, 1.0, 100, NOISES["3 %"], rng)
    assert level.expected_stable_s(100, 60, 0.5) == 60
    for turn in range(4):
        feed(level, 4.0 if turn % 2 == 0 else 1.0, 15, NOISES["3 %"], rng, 100 + 15 * turn)
    assert level.expected_stable_s(160, 60, 0.5) < 20
    assert level.expected_stable_s(160, 60, 3.0) == 60  # by so much it did not shift
    assert level.expected_stable_s(300, 60, 0.5) == 60  # it has been steady since


@pytest.mark.parametrize(("observed_s", "predicted_s"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_what_tells_nothing_is_left_out(observed_s: float, predicted_s: float) -> None:
    level = SpeedLevel(5.0)
    assert not level.add(0, observed_s, predicted_s)
    assert level.slowdown == 1.0

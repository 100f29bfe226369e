"""One more device, like the fastest or like the mean of all, changes what the best plan does."""

from __future__ import annotations

import pytest

import lingualinked as ll
from lingualinked.device import CALLER
from lingualinked.planning.one_more import weigh_one_more, with_mean
from lingualinked.planning.planner import solve
from profiles import profile

WORKLOAD = ll.Workload(prompt_tokens=64, new_tokens=64, num_sessions=8)
FAST, SLOW = ll.Device(name="fast", bandwidth="1Gbit/s"), ll.Device(name="slow", slowdown=3.0, bandwidth="1Gbit/s")


def test_a_mean_device_has_the_mean_times_memory_and_links() -> None:
    made = with_mean(profile(FAST, SLOW), "mean")
    fast, slow, mean = (made.device(name).layers[0].seconds(1, 1, 64) for name in ("fast", "slow", "mean"))
    assert mean == pytest.approx((fast + slow) / 2)
    assert made.link("mean", CALLER).latency_s == pytest.approx(1e-4)
    assert made.link("fast", "mean").bandwidth_bytes_per_s == pytest.approx(125e6)
    assert made.device("mean").device.memory is None
    limited = with_mean(profile(ll.Device(name="a", memory=100), ll.Device(name="b", memory=300)), "mean")
    assert limited.device("mean").device.memory == 200


def test_one_like_the_fastest_gains_more_than_one_like_the_mean() -> None:
    plan = solve(profile(FAST, SLOW), workload=WORKLOAD)
    fastest, mean = weigh_one_more(plan)
    assert "'fast'" in fastest.change
    assert fastest.gain > mean.gain > 1


def test_a_single_device_is_the_fastest_and_has_no_mean() -> None:
    (fastest,) = weigh_one_more(solve(profile(FAST), workload=WORKLOAD))
    assert fastest.gain > 1

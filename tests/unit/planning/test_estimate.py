"""Stated figures give a profile by the roofline model."""

from __future__ import annotations

import math
from typing import Any

import pytest

import lingualinked as ll
from lingualinked.planning.estimate import roofline_profile
from profiles import MIB, model_profile

SLOW_MEMORY = ll.Figures(flops="1PFLOP/s", memory_bandwidth=10 * MIB)
SLOW_COMPUTE = ll.Figures(flops=10 * MIB / 2, memory_bandwidth="1TB/s")


def test_a_step_is_bound_by_memory_or_by_compute() -> None:
    model = model_profile(4)
    devices = [ll.Device(name="memory"), ll.Device(name="compute"), ll.Device(name="half", slowdown=2.0)]
    figures = {"memory": SLOW_MEMORY, "compute": SLOW_COMPUTE, "half": SLOW_MEMORY}
    profile = roofline_profile(model, devices, figures, workload=ll.Workload(prompt_tokens=100, new_tokens=10))
    memory, compute, half = (each.layers[0] for each in profile.devices)
    # 10 MiB of weights at 10 MiB/s, plus the KV that is read; twice as long on a device half as fast.
    assert memory.seconds(1, 1, 0) == pytest.approx(1.0, rel=0.02)
    assert half.seconds(1, 1, 0) == pytest.approx(2 * memory.seconds(1, 1, 0))
    assert memory.seconds(1, 100, 0) == pytest.approx(1.0, rel=0.02)
    # 2.5 M parameters (float32), two operations each, at 5.24 M operations a second; a prefill has 100 times as many.
    assert compute.seconds(1, 1, 0) == pytest.approx(1.0, rel=0.02)
    assert compute.seconds(1, 100, 0) == pytest.approx(100.0, rel=0.05)
    assert profile.versions == {}


def test_links_have_what_their_ends_say() -> None:
    devices = [ll.Device(name="a", bandwidth=1000.0), ll.Device(name="b", latency=0.5)]
    profile = roofline_profile(
        model_profile(2), devices, dict.fromkeys("ab", SLOW_MEMORY), links={("b", "a"): ll.Link(latency=3)}
    )
    assert profile.link("a", "b").bandwidth_bytes_per_s == 1000.0
    assert profile.link("a", "b").latency_s == pytest.approx(0.5, abs=0.01)
    assert profile.link("b", "a").latency_s == pytest.approx(3, abs=0.01)
    assert profile.link("b", "caller").bandwidth_bytes_per_s is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flops": 0, "memory_bandwidth": 1}, "flops=0"),
        ({"flops": -1.0, "memory_bandwidth": 1}, "flops=-1.0"),
        ({"flops": math.nan, "memory_bandwidth": 1}, "flops=nan"),
        ({"flops": "much", "memory_bandwidth": 1}, "flops='much'"),
        ({"flops": True, "memory_bandwidth": 1}, "flops=True"),
        ({"flops": 1, "memory_bandwidth": "x"}, "memory_bandwidth='x'"),
    ],
)
def test_figures_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ArgumentError, match=message):
        ll.Figures(**fields)


def test_figures_must_be_there_for_every_device() -> None:
    with pytest.raises(ll.ArgumentError, match="figures are missing for device 'b'"):
        roofline_profile(model_profile(2), [ll.Device(name="a"), ll.Device(name="b")], {"a": SLOW_MEMORY})
    with pytest.raises(ll.ArgumentError, match="hold 'a' twice"):
        roofline_profile(model_profile(2), [ll.Device(name="a")] * 2, {"a": SLOW_MEMORY})
    with pytest.raises(ll.ArgumentError, match="devices of a profile are empty"):
        roofline_profile(model_profile(2), [], {})

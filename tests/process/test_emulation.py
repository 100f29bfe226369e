"""A worker behaves as a slower device on a slower network, from the start or from some moment on; tokens stay the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lingualinked as ll

pytestmark = pytest.mark.process

IDS = torch.tensor([[5, 17, 3, 99]])
PLAN = ll.Plan.from_spans([("near", 0, 2), ("far", 2, 4)])


@pytest.fixture(scope="module")
def emulating(nothing_outlives_the_session: None) -> Iterator[ll.Cluster]:
    devices = [ll.Device(name="near", threads=1), ll.Device(name="far", threads=1, slowdown=5.0, latency="20ms")]
    with ll.Cluster(devices, links={("far", "caller"): ll.Link(latency="50ms")}) as cluster:
        cluster.wait()
        yield cluster


@pytest.fixture
def model(emulating: ll.Cluster, tiny_llama: str) -> Iterator[ll.ShardedModel]:
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=emulating, plan=PLAN, progress=False) as made:
        yield made
    emulating.throttle("far", slowdown=5.0, latency="20ms")


def compute_s(model: ll.ShardedModel, num_steps: int = 10) -> list[float]:
    """Seconds of compute of each stage in so many steps."""
    before = model.telemetry.stages
    model.generate(IDS, max_new_tokens=num_steps, min_new_tokens=num_steps, do_sample=False)
    return [late.compute_s - early.compute_s for early, late in zip(before, model.telemetry.stages, strict=True)]


def test_tokens_are_the_same(model: ll.ShardedModel, unsharded: Any) -> None:
    expected = unsharded.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), expected)


def test_messages_take_as_long_as_the_links_say(model: ll.ShardedModel) -> None:
    started = time.monotonic()
    model(IDS)
    # near to far 20 ms, far to the caller 50 ms; never less, however fast the machine.
    assert time.monotonic() - started >= 0.07


def test_a_worker_is_throttled_while_it_runs(model: ll.ShardedModel, emulating: ll.Cluster) -> None:
    compute_s(model)
    emulating.throttle("far", slowdown=1.0)
    near, far = compute_s(model)
    emulating.throttle("far", slowdown=400.0)
    # Both stages hold two layers: the one that rests 400 times as long takes longer, on any machine.
    _, throttled = compute_s(model)
    assert throttled > 20 * far
    assert throttled > 20 * near
    assert emulating.device("far").slowdown == 5.0  # a device is what it was made as


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("moon", {}, "no device 'moon'"),
        ("far", {"slowdown": 0.5}, "slowdown=0.5 of device 'far'"),
        ("far", {"bandwidth": 0}, "bandwidth of device 'far'=0"),
        ("far", {"latency": "x"}, "latency of device 'far'='x'"),
    ],
)
def test_what_can_not_be_emulated_changes_nothing(
    emulating: ll.Cluster, name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ll.ArgumentError, match=message):
        emulating.throttle(name, **arguments)


def test_a_link_must_lead_to_a_device() -> None:
    with pytest.raises(ll.ArgumentError, match="there is no device 'moon'"):
        ll.Cluster(2, links={("worker-0", "moon"): ll.Link()})


def test_a_closed_cluster_is_not_throttled() -> None:
    cluster = ll.Cluster(1)
    cluster.close()
    with pytest.raises(ll.ClosedError):
        cluster.throttle("worker-0", slowdown=2.0)

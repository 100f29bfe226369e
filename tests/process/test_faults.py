"""Faults on command: what a cut link and a killed worker do to a model, and what is as before once the link is restored."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lingualinked as ll
from lingualinked.testing.faulty_cluster import FaultyCluster
from waiting import num_sessions, wait_until

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8]])


@pytest.fixture(scope="module")
def cluster(shared_fork_server: None) -> Iterator[FaultyCluster]:
    devices = [ll.Device(name=name, threads=1) for name in ("first", "second", "spare", "doomed")]
    with FaultyCluster(devices) as cluster:
        cluster.workers()  # connections stand, and no test is taken to leave them
        yield cluster


@pytest.fixture(scope="module")
def model(cluster: FaultyCluster, tiny_llama: str) -> Iterator[ll.ShardedModel]:
    plan = ll.Plan.from_spans([("first", 0, 2), ("second", 2, 4)])
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model:
        yield model


@pytest.fixture(autouse=True)
def restored(cluster: FaultyCluster) -> Iterator[None]:
    yield
    cluster.restore()


@pytest.mark.parametrize("what", [("first", "second"), ("second", "caller"), ("caller", "first"), "second"])
def test_a_step_waits_for_a_link_that_is_cut(
    cluster: FaultyCluster, model: ll.ShardedModel, what: str | tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model(IDS).logits
    with cluster.cut(what), monkeypatch.context() as impatience:
        assert cluster.is_harmed
        impatience.setattr(model._pipeline, "timeout_s", 0.2)
        with pytest.raises(ll.StepTimeoutError, match=r"within timeout_s=0\.2"):
            model(IDS)
    assert not cluster.is_harmed
    # What arrives now of the step that nobody waits for any more changes nothing.
    assert torch.equal(model(IDS).logits, before)
    wait_until(lambda: num_sessions(model) == [0, 0])


def test_links_that_a_model_does_not_use(cluster: FaultyCluster, model: ll.ShardedModel) -> None:
    cluster.cut("spare")
    cluster.cut(("second", "first"))
    model(IDS)
    cluster.throttle("spare", slowdown=2.0)  # is told over cut links too
    cluster.throttle("spare", slowdown=1.0)
    cluster.restore("spare")
    assert cluster.is_harmed
    cluster.restore(("second", "first"))
    assert not cluster.is_harmed


def test_a_short_cut_costs_time_alone(cluster: FaultyCluster, tiny_llama: str) -> None:
    plan = ll.Plan.from_spans([("first", 0, 2), ("second", 2, 4)])
    with (
        ThreadPoolExecutor(1) as pool,
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model,
    ):
        arguments = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
        expected = model.generate(IDS, **arguments)
        generating = pool.submit(model.generate, IDS, **arguments)
        for what in (("first", "second"), "second", ("second", "caller")):
            with cluster.cut(what):
                pass
        cut = cluster.cut("first")
        assert not generating.done() or torch.equal(generating.result(), expected)
        cut.close()
        assert torch.equal(generating.result(60), expected)


def test_a_worker_is_killed_behind_a_cut_link(cluster: FaultyCluster) -> None:
    with cluster.cut("doomed"):
        cluster.kill("doomed")
        assert "doomed" not in cluster.pids
    with pytest.raises(ll.ArgumentError, match="has ended already"):
        cluster.kill("doomed")
    assert cluster.is_harmed


@pytest.mark.parametrize("what", ["nowhere", ("first", "first"), ("first", "nowhere"), "caller", ("first",), None])
def test_what_is_no_link(cluster: FaultyCluster, what: object) -> None:
    with pytest.raises(ll.ArgumentError, match=r"no (link|device)"):
        cluster.cut(what)

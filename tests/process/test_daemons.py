"""Workers that daemons start: the tokens of the uncut model, on remote devices alone and beside local ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import lingualinked as ll
from daemons import DaemonProcess, Daemons, running_daemons
from lingualinked.cluster.remote.remote_workers import RemoteWorkers
from lingualinked.cluster.workers.cluster_workers import ClusterWorkers

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8]])


@pytest.fixture(scope="module")
def daemons(shared_fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with running_daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        yield daemons


@pytest.fixture(scope="module")
def pair(daemons: Daemons) -> list[DaemonProcess]:
    return [daemons.start("--name", "first"), daemons.start("--name", "second")]


def generate(model: Any, num_tokens: int = 8) -> torch.Tensor:
    return model.generate(  # type: ignore[no-any-return]
        IDS, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )


def test_two_daemons_give_the_tokens_of_the_uncut_model(
    pair: list[DaemonProcess], tiny_llama: str, unsharded: Any
) -> None:
    devices = [daemon.device(name) for daemon, name in zip(pair, "ab", strict=True)]
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with (
        ll.Cluster(devices) as cluster,
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model,
    ):
        assert torch.equal(generate(model), generate(unsharded))
        assert [device.threads for device in cluster.devices] == [1, 1]
        assert cluster._workers.launcher is None  # nothing is started here
        workers = [worker.pid for daemon in pair for worker in daemon.workers()]
        assert sorted(cluster.pids.values()) == sorted(workers)
    assert [daemon.workers() for daemon in pair] == [[], []]


def test_local_and_remote_devices_work_together(pair: list[DaemonProcess], tiny_llama: str, unsharded: Any) -> None:
    devices = [ll.Device(name="here", threads=1), pair[0].device("there")]
    for spans in ([("here", 0, 2), ("there", 2, 4)], [("there", 0, 1), ("here", 1, 4)]):
        with (
            ll.Cluster(devices) as cluster,
            ll.ShardedModel.from_pretrained(
                tiny_llama, cluster=cluster, plan=ll.Plan.from_spans(spans), progress=False
            ) as model,
        ):
            assert torch.equal(generate(model), generate(unsharded))


def test_layers_move_between_devices_that_come_later(
    pair: list[DaemonProcess], tiny_llama: str, unsharded: Any
) -> None:
    """Onto a remote device that a local cluster takes in, to another one, and back, while tokens are generated."""
    expected = generate(unsharded, 60)
    with (
        ll.Cluster([ll.Device(name="here", threads=1)]) as cluster,
        ll.ShardedModel.from_pretrained(
            tiny_llama, cluster=cluster, plan=ll.Plan.from_spans([("here", 0, 4)]), progress=False
        ) as model,
        ThreadPoolExecutor(1) as pool,
    ):
        for daemon, name in zip(pair, "ab", strict=True):
            cluster.add(daemon.device(name))
        assert set(cluster.pids) == {"here", "a", "b"}
        cluster.throttle("a", slowdown=1.5)  # it rests after each step, as a local one does
        with pytest.raises(ll.ArgumentError, match="bandwidth='1MB/s' has no effect on device 'a'"):
            cluster.throttle("a", bandwidth="1MB/s")
        for spans in (
            [("here", 0, 1), ("a", 1, 4)],
            [("b", 0, 3), ("a", 3, 4)],
            [("a", 0, 2), ("b", 2, 4)],
            [("here", 0, 4)],
        ):
            tokens = pool.submit(generate, model, 60)
            model.rebalance(ll.Plan.from_spans(spans))
            assert torch.equal(tokens.result(), expected)
    assert [daemon.workers() for daemon in pair] == [[], []]


def test_a_device_is_added_whose_worker_is_faster_than_the_cluster(
    pair: list[DaemonProcess], tiny_llama: str, unsharded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key is here before the cluster has done anything else for the device."""
    prepare, report = ClusterWorkers.prepare, RemoteWorkers._report_key
    is_here = threading.Event()

    def prepare_slowly(workers: ClusterWorkers, *arguments: Any) -> tuple[ll.Device, ...]:
        prepared = prepare(workers, *arguments)
        if any(device.address is not None for device in prepared):
            assert is_here.wait(30)
        return prepared

    def report_and_say_so(workers: RemoteWorkers, *said: str) -> None:
        report(workers, *said)
        is_here.set()

    monkeypatch.setattr(ClusterWorkers, "prepare", prepare_slowly)
    monkeypatch.setattr(RemoteWorkers, "_report_key", report_and_say_so)
    with ll.Cluster([ll.Device(name="here", threads=1)], timeout_s=60) as cluster:
        cluster.add(pair[0].device("a"))
        plan = ll.Plan.from_spans([("here", 0, 2), ("a", 2, 4)])
        with ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model:
            assert torch.equal(generate(model), generate(unsharded))


def test_several_callers_and_models_at_once(pair: list[DaemonProcess], tiny_llama: str, unsharded: Any) -> None:
    expected = generate(unsharded, 40)

    def serve(first: str, second: str) -> list[torch.Tensor]:
        devices = [daemon.device(name) for daemon, name in zip(pair, (first, second), strict=True)]
        futures = []
        plans = [ll.Plan.from_spans([(first, 0, k), (second, k, 4)]) for k in (1, 3)]
        with ll.Cluster(devices) as cluster, ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as models:
            for plan in plans:
                models.enter_context(
                    model := ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False)
                )
                futures.append(pool.submit(generate, model, 40))
            return [future.result() for future in futures]

    with ThreadPoolExecutor(2) as pool:
        for tokens in [*pool.map(serve, "ac", "bd")]:
            assert all(torch.equal(each, expected) for each in tokens)
    assert [daemon.workers() for daemon in pair] == [[], []]


def test_a_pair_is_led_through_the_daemon_of_a_third_device(
    daemons: Daemons, pair: list[DaemonProcess], tiny_llama: str, unsharded: Any
) -> None:
    with daemons.start("--name", "hub", "--relay") as hub:
        devices = [daemon.device(name) for daemon, name in zip((*pair, hub), ("a", "b", "hub"), strict=True)]
        plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
        links = {("a", "b"): ll.Link(relay="hub"), ("b", "caller"): ll.Link(relay="hub")}
        with (
            ll.Cluster(devices, links=links) as cluster,
            ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model,
        ):
            assert torch.equal(generate(model), generate(unsharded))
            assert hub.log().count("relays to tcp://127.0.0.1:") == 2
        with (
            ll.Cluster(devices, links={("hub", "a"): ll.Link(relay="b")}) as cluster,
            pytest.raises(ll.errors.DaemonError, match=r"device 'b' .* it does not relay: start it with --relay"),
        ):
            cluster.wait()

"""Workers that daemons start: the tokens of the uncut model, on remote devices alone and beside local ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lingualinked as ll
from daemons import DaemonProcess, Daemons, running_daemons

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54, 8]])


@pytest.fixture(scope="module")
def daemons(shared_fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with running_daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        yield daemons


@pytest.fixture(scope="module")
def pair(daemons: Daemons) -> list[DaemonProcess]:
    return [daemons.start("--name", "first"), daemons.start("--name", "second")]


def greedy(model: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[no-any-return]


def test_two_daemons_give_the_tokens_of_the_uncut_model(
    pair: list[DaemonProcess], tiny_llama: str, unsharded: Any
) -> None:
    devices = [daemon.device(name) for daemon, name in zip(pair, "ab", strict=True)]
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with (
        ll.Cluster(devices) as cluster,
        ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model,
    ):
        assert torch.equal(greedy(model), greedy(unsharded))
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
            assert torch.equal(greedy(model), greedy(unsharded))

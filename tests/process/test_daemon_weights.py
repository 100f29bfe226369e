"""Daemons on hosts without the caller's folders: weights come from a copy, from the cache, or are sent once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from daemons import Daemons, running_daemons
from lingualinked.cluster.weights import file_supplies
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.describing import describe_contents
from lingualinked.model.weight_files.weight_cache import WeightCache
from remote_workers import Traffic, traffic

pytestmark = pytest.mark.process
__all__ = ["traffic"]

IDS = torch.tensor([[1, 17, 93, 54, 8]])


@pytest.fixture
def daemons(shared_fork_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemons]:
    """Daemons that keep weights in a cache of their own, and don't find the caller's files by their path."""

    def describe_elsewhere(spec: ModelSpec, *, verify: bool = False) -> ModelSpec:
        files = [dataclasses.replace(file, path=f"/elsewhere{file.path}") for file in spec.files]
        return dataclasses.replace(describe_contents(spec, verify=verify), files=tuple(files))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_supplies, "_describe", describe_elsewhere)
    with running_daemons(tmp_path) as daemons:
        yield daemons


def run(devices: list[ll.Device], folder: str) -> torch.Tensor:
    plan = ll.Plan.from_spans([(devices[0].name, 0, 2), (devices[-1].name, 2, 4)])
    with (
        ll.Cluster(devices) as cluster,
        ll.ShardedModel.from_pretrained(folder, cluster=cluster, plan=plan, progress=False) as model,
    ):
        return greedy(model)


def greedy(model: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[no-any-return]


def test_weights_travel_once_and_a_second_start_sends_none(
    daemons: Daemons, tmp_path: Path, tiny_llama: str, unsharded: Any, traffic: Traffic
) -> None:
    daemon = daemons.start()
    devices = [daemon.device("a"), ll.Device(name="b", threads=1)]
    assert torch.equal(run(devices, tiny_llama), greedy(unsharded))
    assert traffic.num_messages["FilePart"] > 0
    cache = WeightCache(tmp_path / "cache" / "lingualinked" / "weights")
    assert 0 < sum(entry.held_bytes for entry in cache.entries()) < traffic.num_bytes
    before = traffic.num_messages["FilePart"]
    assert torch.equal(run(devices, tiny_llama), greedy(unsharded))
    assert traffic.num_messages["FilePart"] == before


def test_a_copy_is_used_and_compared_if_asked_for(
    daemons: Daemons, tmp_path: Path, tiny_llama: str, unsharded: Any, traffic: Traffic
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tiny_llama, models / "llama")
    daemon = daemons.start("--models", str(models), "--cache-bytes", "0", "--verify")
    assert torch.equal(run([daemon.device("a")], tiny_llama), greedy(unsharded))
    assert traffic.num_messages["FilePart"] == 0
    assert not (tmp_path / "cache" / "lingualinked" / "weights").exists()
    file = models / "llama" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        ll.CheckpointError, match=r"^device 'a': .* in .*/models/llama/model.safetensors on host .* differs"
    ):
        run([daemon.device("a")], tiny_llama)
    daemon.wait_until_idle()

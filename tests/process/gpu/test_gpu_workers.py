"""Workers on a GPU: found, measured, limited in memory, and alive after a step that had too little of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import accelerators
import lingualinked as ll
from families import reference, save_tiny
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])


def generate(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return tokens


def test_auto_takes_every_gpu(tiny_llama: str, unsharded: PreTrainedModel, cache: Path) -> None:
    with ll.ShardedModel.from_pretrained(tiny_llama, devices="auto", progress=False) as model:
        found = [device.accelerator for device in model.cluster.devices]
        if accelerators.chosen.startswith("cuda"):
            assert found == [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        assert set(model.hf_device_map.values()) <= {"cpu", *found}
        assert all(device.free_bytes > 0 for device in model.profile.devices)
        assert torch.equal(generate(model), generate(unsharded))


def test_a_model_is_measured_on_a_gpu(tiny_llama: str, cache: Path) -> None:
    devices = [accelerators.device("a"), accelerators.device("b", memory="1GiB")]
    with ll.Cluster(devices) as cluster:
        profile = ll.profile_model(tiny_llama, cluster, workload=ll.Workload(prompt_tokens=32, new_tokens=8))
    for device in profile.devices:
        for times in (*device.layers, device.prologue, device.epilogue):
            assert all(step.seconds > 0 for step in times.steps)
        assert device.free_bytes > 0
    assert profile.device("b").capacity_bytes <= 1 << 30
    assert ll.solve(profile).predicted.tokens_per_s > 0


def test_a_step_that_needs_too_much_memory_ends_its_session_alone(tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path)
    with (
        ll.Cluster([accelerators.device("small", memory="48MiB"), accelerators.device("b")]) as cluster,
        ll.ShardedModel.from_pretrained(
            str(folder), cluster=cluster, plan=ll.Plan.from_spans([("b", 0, 2), ("small", 2, 4)]), progress=False
        ) as model,
    ):
        pids, whole = cluster.pids, reference(folder)
        past, expected = model(IDS).past_key_values, whole(IDS).past_key_values
        for _ in range(2):
            with pytest.raises(ll.DeviceMemoryError, match="worker on device 'small'"):
                model(IDS.repeat(9000, 9), use_cache=False)
        assert torch.equal(generate(model), generate(whole))
        logits = model(IDS[:, :2], past_key_values=past).logits
        assert torch.equal(logits, whole(IDS[:, :2], past_key_values=expected).logits)
        assert cluster.pids == pids
        wait_until(lambda: num_sessions(model) == [1, 1])


def test_sessions_of_several_threads(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = [torch.tensor([[1, 3 + index, 60 + index]]) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        ours = list(pool.map(lambda ids: generate(sharded, ids), prompts))
    assert all(torch.equal(tokens, generate(unsharded, ids)) for ids, tokens in zip(prompts, ours, strict=True))


def test_what_workers_report(place: Callable[..., Any], tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    past = model(IDS).past_key_values
    for stage in model.telemetry.stages:
        assert stage.weight_bytes > 0
        assert stage.kv_bytes > 0
    del past

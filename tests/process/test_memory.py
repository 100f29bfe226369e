"""Each worker reads and holds its own share, and the caller no layer; measured on a checkpoint of over 500 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = [pytest.mark.process, pytest.mark.slow]

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def write(folder: Path) -> None:
    """Write a checkpoint of any weights at all: drawing random ones would take longer than all that is measured."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="200MB")


MEASURE = """
import json, os, shutil, sys, torch
import lingualinked as ll

def status(pid, field):
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def read_bytes(pid):
    with open(f"/proc/{pid}/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))

def forget_peak(pid):
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew

if __name__ == "__main__":
    torch.set_num_threads(1)
    import lingualinked.sharded.loading.load
    import transformers.models.llama.modeling_llama
    devices = [ll.Device(name=name, threads=1) for name in "abc"]
    ids = torch.randint(0, 8000, (1, 64))

    def talk(model):
        past = model(ids, logits_to_keep=1).past_key_values
        for _ in range(8):
            model(ids[:, :1], past_key_values=past)
        return past

    # Probes of how this processor rounds take memory of their own, once: other workers run them first, and they are kept on disk.
    with ll.Cluster(devices) as cluster:
        with ll.ShardedModel.from_pretrained(
            sys.argv[4], cluster=cluster, plan="even", load_format="dummy", progress=False
        ) as model:
            talk(model)
    with ll.Cluster(devices) as cluster:
        # An idle worker has served before: pages of torch's code count as resident once they have run, and are shared.
        idle = ll.ShardedModel.from_pretrained(sys.argv[2], cluster=cluster, plan="even", dtype=sys.argv[3], progress=False)
        with idle as model:
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)
        pids = cluster.pids | {"caller": os.getpid()}
        before = {}
        for name, pid in pids.items():
            forget_peak(pid)
            before[name] = (status(pid, "VmRSS"), read_bytes(pid))
        model = ll.ShardedModel.from_pretrained(sys.argv[1], cluster=cluster, plan="even", progress=False)
        past = talk(model)
        stages = {stage.device: stage for stage in model.telemetry.stages}
        measured = {}
        for name, pid in pids.items():
            resident, read = before[name]
            measured[name] = {"peak_bytes": status(pid, "VmHWM") - resident, "read_bytes": read_bytes(pid) - read}
            if name in stages:
                measured[name] |= {"own_bytes": stages[name].weight_bytes, "kv_bytes": stages[name].kv_bytes}
        before = status(os.getpid(), "VmRSS")
        forget_peak(os.getpid())
        saved = os.path.join(sys.argv[1], "saved")
        model.save_pretrained(saved)  # one file
        measured["saving"] = {"peak_bytes": status(os.getpid(), "VmHWM") - before}
        measured["saving"]["file_bytes"] = os.path.getsize(os.path.join(saved, "model.safetensors"))
        shutil.rmtree(saved)
        print(json.dumps(measured))
        model.close()
"""


NUM_LAYERS = {"float32": 12, "bfloat16": 24}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])  # in bfloat16, weights are packed once they are read
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: str
) -> dict[str, dict[str, int]]:
    folder, shallow = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("shallow")
    for where, num_layers in ((folder, NUM_LAYERS[request.param]), (shallow, 3)):
        config = SHAPE | {"dtype": request.param, "num_hidden_layers": num_layers}
        (where / "config.json").write_text(json.dumps(config))
    write(folder)
    return json.loads(run(MEASURE, folder, tiny_llama, request.param, shallow).splitlines()[-1])


def run(script: str, *paths: Path | str) -> str:
    arguments: list[Any] = [sys.executable, "-c", script, *paths]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_checkpoint_is_large(measured: dict[str, dict[str, int]]) -> None:
    assert sum(measured[name]["own_bytes"] for name in "abc") > 500e6


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_worker_holds_its_own_share(measured: dict[str, dict[str, int]], name: str) -> None:
    worker = measured[name]
    assert worker["peak_bytes"] <= 1.15 * (worker["own_bytes"] + worker["kv_bytes"])


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_worker_reads_its_own_share(measured: dict[str, dict[str, int]], name: str) -> None:
    assert measured[name]["read_bytes"] <= 1.1 * measured[name]["own_bytes"]


def test_the_caller_holds_no_layer(measured: dict[str, dict[str, int]]) -> None:
    assert measured["caller"]["peak_bytes"] < 50e6


def test_saving_holds_few_tensors_in_the_caller(measured: dict[str, dict[str, int]]) -> None:
    saving = measured["saving"]
    assert saving["file_bytes"] > 500e6
    assert saving["peak_bytes"] < 100e6  # the largest tensor has 33 MB

"""``python -m benchmarks fetching``: how fast weights come from the caller and from daemons that have them.

Knows daemons on the loopback interface, each with a cache of its own, and the clocks of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lingualinked as ll
from lingualinked.cli.repeats import Repeats
from lingualinked.cluster.weights import file_supplies
from lingualinked.console import new_console
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.describing import describe_contents
from lingualinked.quantities import count_text
from lingualinked.tables import Rows
from lingualinked.transport.keys.key_files import make_key

# About 390 MiB in bfloat16, in three files.
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}
_MIB = 1 << 20


@dataclasses.dataclass
class _Load:
    """Seconds of a load, and of the processors at both ends."""

    wall_s: float
    caller_s: float
    worker_s: float


def run_fetching(max_sources: int, repeats: int) -> None:
    """Print MiB/s of a copy of the files, and of loads from so many sources, beyond what a load from the cache takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(_CONFIG))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
        model.save_pretrained(path, max_shard_size="150MB")
        size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / _MIB
        rows = [
            ("copy of the files", Repeats([size / _copy(path) for _ in range(repeats)]).text(unit=" MiB/s"), "", "")
        ]
        for num_sources in range(1, max_sources + 1):
            loads = [_fetch(path, Path(folder) / f"{num_sources}-{each}", num_sources) for each in range(repeats)]
            rates = Repeats([size / load.wall_s for load in loads]).text(unit=" MiB/s")
            caller, worker = (
                Repeats([1e3 * seconds / size for seconds in each]).text(unit=" ms/MiB")
                for each in ([load.caller_s for load in loads], [load.worker_s for load in loads])
            )
            rows.append((f"fetched from {count_text(num_sources, 'source')}", rates, caller, worker))
    title = f"Weights of {size:.0f} MiB over CURVE on the loopback interface, median of {repeats}"
    new_console().print(Rows(title, ("what", "measured", "caller's processor", "worker's"), rows))


def _copy(path: Path) -> float:
    started = time.perf_counter()
    for file in path.glob("*.safetensors"):
        with file.open("rb", buffering=0) as source, (path / "copy").open("wb", buffering=0) as target:
            while part := source.read(_MIB):
                target.write(part)
    return time.perf_counter() - started


def _fetch(path: Path, folder: Path, num_sources: int) -> _Load:
    """Load the model on one device after the others but the caller have it; return what fetching adds to a load."""
    with _daemons(folder, num_sources) as devices, ll.Cluster(devices) as cluster:
        cluster.wait()
        for device in devices[1:]:
            _load(cluster, path, device.name)
        first, again = (_load(cluster, path, devices[0].name) for _ in range(2))
        return _Load(first.wall_s - again.wall_s, first.caller_s - again.caller_s, first.worker_s - again.worker_s)


def _load(cluster: ll.Cluster, path: Path, name: str) -> _Load:
    worker = psutil.Process(cluster.pids[name])
    began = time.perf_counter(), time.process_time(), sum(worker.cpu_times()[:2])
    plan = ll.Plan.from_spans([(name, 0, _CONFIG["num_hidden_layers"])])  # type: ignore[list-item]
    ll.ShardedModel.from_pretrained(str(path), cluster=cluster, plan=plan, progress=False).close()
    ended = time.perf_counter(), time.process_time(), sum(worker.cpu_times()[:2])
    return _Load(*(after - before for before, after in zip(began, ended, strict=True)))


@contextlib.contextmanager
def _daemons(folder: Path, number: int) -> Iterator[list[ll.Device]]:
    """Start daemons with one thread and a cache each, which don't find the caller's files by their path."""

    def describe_elsewhere(spec: ModelSpec, **arguments: Any) -> ModelSpec:
        files = [dataclasses.replace(file, path=f"/on/another/host{file.path}") for file in spec.files]
        return dataclasses.replace(describe_contents(spec, **arguments), files=tuple(files))

    config, describe = os.environ.get("XDG_CONFIG_HOME"), file_supplies._describe  # noqa: SLF001 - both are put back
    os.environ["XDG_CONFIG_HOME"] = str(folder / "config")
    file_supplies._describe = describe_elsewhere  # type: ignore[assignment]  # noqa: SLF001
    key = make_key("default").public
    with contextlib.ExitStack() as ends:
        processes = []
        for each in range(number):
            command = [sys.executable, "-m", "lingualinked.worker", "--bind", "tcp://127.0.0.1:0", "--threads", "1"]
            folders = {
                "XDG_CONFIG_HOME": str(folder / f"config-{each}"),
                "XDG_CACHE_HOME": str(folder / f"cache-{each}"),
            }
            process = ends.enter_context(
                subprocess.Popen(
                    [*command, "--authorize", key],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **folders},
                )
            )
            ends.callback(process.terminate)
            processes.append(process)
        devices = []
        for each, process in enumerate(processes):
            assert process.stdout is not None
            address, _, server_key = process.stdout.readline().decode().strip().partition("#")
            devices.append(ll.Device(name=f"daemon-{each}", address=address, server_key=server_key))
        try:
            yield devices
        finally:
            file_supplies._describe = describe  # noqa: SLF001
            os.environ.pop("XDG_CONFIG_HOME")
            if config is not None:
                os.environ["XDG_CONFIG_HOME"] = config

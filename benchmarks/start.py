"""``python -m benchmarks start``: from nothing to the first token, and what planning adds to that.

Knows scripts and a clock: fresh Python processes, in turn.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.device import Device, Link
from lingualinked.errors import LingualinkedError
from lingualinked.quantities import count_text
from lingualinked.sample import sample_model
from lingualinked.tables import Rows

_PLAIN = """
import json, time
started = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r}, dtype="auto")
model.generate(torch.tensor([[1, 5, 7, 9]]), max_new_tokens=1, do_sample=False)
print(json.dumps({{"first": time.perf_counter() - started}}))
"""

_SHARDED = """
import json, time
import lingualinked as ll
from lingualinked import Device, Link
started = time.perf_counter()
cluster = ll.Cluster({devices!r}, links={links!r})
model = ll.ShardedModel.from_pretrained({path!r}, cluster=cluster, progress=False)
import torch
ids = torch.tensor([[1, 5, 7, 9]])
model.generate(ids, max_new_tokens=1, do_sample=False)
first = time.perf_counter() - started
started = time.perf_counter()
second = ll.ShardedModel.from_pretrained({path!r}, cluster=cluster, progress=False)
second.generate(ids, max_new_tokens=1, do_sample=False)
print(json.dumps({{"first": first, "second": time.perf_counter() - started}}))
cluster.close()
"""


# About 500 MB in bfloat16.
_LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 16000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

_WRITE = """
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained({path!r})
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained({path!r})
print(json.dumps({{}}))
"""

_PLANNED = """
import json, time
import lingualinked as ll
from lingualinked import Device, Link
started = time.perf_counter()
cluster = ll.Cluster({devices!r}, links={links!r})
model = ll.ShardedModel.from_pretrained({path!r}, cluster=cluster, plan={plan!r}, progress=False)
import torch
model.generate(torch.tensor([[1, 5, 7, 9]]), max_new_tokens=1, do_sample=False)
print(json.dumps({{"first": time.perf_counter() - started}}))
cluster.close()
"""


def run_planned_start(devices: Sequence[Device], links: Mapping[tuple[str, str], Link], repeats: int) -> None:
    """Print seconds to the first token of a model of 500 MB: split evenly, planned for the first time, and again."""
    with tempfile.TemporaryDirectory() as folder:
        path, kept = str(Path(folder) / "model"), Path(folder) / "kept"
        Path(path).mkdir()
        (Path(path) / "config.json").write_text(json.dumps(_LARGE))
        _timed(_WRITE.format(path=path))
        even_script = _PLANNED.format(path=path, devices=devices, links=links, plan="even")
        planned_script = _PLANNED.format(path=path, devices=devices, links=links, plan=None)
        _timed(even_script)  # warms the file cache for all
        even: list[float] = []
        first: list[float] = []
        again: list[float] = []
        for _ in range(repeats):
            shutil.rmtree(kept, ignore_errors=True)
            for times, script in ((even, even_script), (first, planned_script), (again, planned_script)):
                times.append(_timed(script, {"XDG_CACHE_HOME": str(kept)})["first"])
    rows = [
        ("split evenly, nothing measured", Repeats(even).text(unit=" s")),
        ("measured and solved, added", _differences(first, even).text(unit=" s")),
        ("read from disk, added", _differences(again, even).text(unit=" s")),
    ]
    title = f"Start of a 500 MB model on {count_text(len(devices), 'worker')}, median of {repeats}"
    new_console().print(Rows(title, ("what", "measured"), rows))


def _differences(left: list[float], right: list[float]) -> Repeats:
    return Repeats([a - b for a, b in zip(left, right, strict=True)])


def run_start(devices: Sequence[Device], links: Mapping[tuple[str, str], Link], repeats: int) -> None:
    """Print seconds to the first token of both sides, and the ratio pair by pair."""
    path = sample_model()
    plain_script = _PLAIN.format(path=path)
    sharded_script = _SHARDED.format(path=path, devices=devices, links=links)
    _timed(plain_script)  # warms the file cache for both
    plain, sharded, second = [], [], []
    for _ in range(repeats):
        plain.append(_timed(plain_script)["first"])
        times = _timed(sharded_script)
        sharded.append(times["first"])
        second.append(times["second"])
    rows = [
        ("one plain process", Repeats(plain).text(unit=" s")),
        (f"{count_text(len(devices), 'worker')}, from nothing", Repeats(sharded).text(unit=" s")),
        ("ratio", ratios(Repeats(sharded), Repeats(plain)).text()),
        ("a second model on the same cluster", Repeats(second).text(unit=" s")),
    ]
    new_console().print(Rows(f"Time to the first token, median of {repeats}", ("what", "measured"), rows))


def _timed(script: str, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if result.returncode != 0:
        cause = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise LingualinkedError(f"a process that was to be timed has failed: {cause}")
    times: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return times

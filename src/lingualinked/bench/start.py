"""``lingualinked bench start``: from nothing to the first token.

Knows two scripts and a clock: fresh Python processes, in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys

from rich.console import Console

from lingualinked.bench.samples import Samples, ratios
from lingualinked.display.tables import Rows
from lingualinked.sample import sample_model

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
started = time.perf_counter()
model = ll.ShardedModel.from_pretrained({path!r}, devices={devices}, progress=False)
import torch
ids = torch.tensor([[1, 5, 7, 9]])
model.generate(ids, max_new_tokens=1, do_sample=False)
first = time.perf_counter() - started
started = time.perf_counter()
second = ll.ShardedModel.from_pretrained({path!r}, cluster=model.cluster, progress=False)
second.generate(ids, max_new_tokens=1, do_sample=False)
print(json.dumps({{"first": first, "second": time.perf_counter() - started}}))
model.close()
"""


def run_start(num_devices: int, repeats: int) -> None:
    """Print seconds to the first token of both sides, and the ratio pair by pair."""
    path = sample_model()
    plain_script = _PLAIN.format(path=path)
    sharded_script = _SHARDED.format(path=path, devices=num_devices)
    _timed(plain_script)  # warms the file cache for both
    plain, sharded, second = [], [], []
    for _ in range(repeats):
        plain.append(_timed(plain_script)["first"])
        times = _timed(sharded_script)
        sharded.append(times["first"])
        second.append(times["second"])
    rows = [
        ("one plain process", Samples(plain).text(unit=" s")),
        (f"{num_devices} workers, from from_pretrained", Samples(sharded).text(unit=" s")),
        ("ratio", ratios(Samples(sharded), Samples(plain)).text()),
        ("a second model on the same cluster", Samples(second).text(unit=" s")),
    ]
    Console().print(Rows(f"Time to the first token, median of {repeats}", ("what", "measured"), rows).to_rich())


def _timed(script: str) -> dict[str, float]:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    times: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return times

"""``python -m benchmarks hooks``: what hooks add to a step, beside the time of a hop between processes in the same run.

Knows the public face; alternates all cases in one process, step by step.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lingualinked as ll
from lingualinked.cli.bench.shapes import LLAMA_160M
from lingualinked.cli.repeats import Repeats
from lingualinked.console import new_console
from lingualinked.tables import Rows

_PLAIN = "nothing registered"
_NUM_WARM = 3  # rounds before those that count
_CONTEXT = 16
_PROMPT = 512

Hook = Callable[[Any], Any]
"""Registers hooks on a module of a model; returns what removes them."""


def _add(value: Any, *_: Any) -> torch.Tensor:
    states = value if isinstance(value, torch.Tensor) else value[0]
    return states + 1


CASES: dict[str, Hook] = {
    _PLAIN: lambda _: contextlib.nullcontext(),
    "one hook that reads an output": lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
    "one hook that replaces it": lambda layer: layer.mlp.register_forward_hook(lambda _m, _a, output: _add(output)),
    "ll.hook that reads it": lambda layer: ll.hook(layer.mlp, lambda _: None),
    "ll.hook that replaces it": lambda layer: ll.hook(layer.mlp, _add),
    "ll.hook(positions=-1) that reads it": lambda layer: ll.hook(layer.mlp, lambda _: None, positions=-1),
    "ll.hook(positions=-1) that replaces it": lambda layer: ll.hook(layer.mlp, _add, positions=-1),
    "one hook before a module": lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None),
}


def run_hooks(repeats: int) -> None:
    """Print what each case adds to a decode step and to a prefill, in a model of 160 million parameters in two stages."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    console = new_console()
    plan = ll.Plan.from_spans([("worker-0", 0, 6), ("worker-1", 6, 12)])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_160M))
        with (
            ll.Cluster([ll.Device(name=name, threads=1) for name in plan.devices]) as cluster,
            ll.ShardedModel.from_pretrained(
                folder, cluster=cluster, plan=plan, load_format="dummy", progress=False
            ) as model,
        ):
            console.print(_measure_decode(model, 40 * repeats))
            console.print(_measure_prefill(model, 4 * repeats))
            console.print(_measure_check(model))


def _measure_decode(model: Any, num_rounds: int) -> Rows:
    ids = torch.randint(3, LLAMA_160M["vocab_size"], (1, _CONTEXT))
    pasts = {name: model(ids, logits_to_keep=1).past_key_values for name in CASES}
    hops: list[float] = []

    def step_us(name: str) -> float:
        began_s = time.perf_counter()
        model(ids[:, :1], past_key_values=pasts[name])
        step_s = time.perf_counter() - began_s
        if name == _PLAIN:
            stages = pasts[name].session.last_step.stages
            hops.append((step_s - sum(each.compute_s for each in stages)) / (len(stages) + 1) * 1e6)
        return step_s * 1e6

    times = _alternate(model, step_us, num_rounds)
    hop_us = _quiet(hops[_NUM_WARM:])
    return _rows(f"A decode step; a hop takes {hop_us:.0f} µs", times, hop_us)


def _measure_prefill(model: Any, num_rounds: int) -> Rows:
    ids = torch.randint(3, LLAMA_160M["vocab_size"], (1, _PROMPT))

    def prefill_us(_: str) -> float:
        began_s = time.perf_counter()
        model(ids, logits_to_keep=1, use_cache=False)
        return (time.perf_counter() - began_s) * 1e6

    return _rows(f"A prefill of {_PROMPT} tokens", _alternate(model, prefill_us, num_rounds), None)


def _alternate(model: Any, measure: Callable[[str], float], num_rounds: int) -> dict[str, list[float]]:
    """Measure all cases in turn, in one order and in the other; return the times of each."""
    layer = model.model.layers[3]
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(_NUM_WARM + num_rounds):
        for name in CASES if number % 2 else reversed(CASES):
            with CASES[name](layer):
                value = measure(name)
            if number >= _NUM_WARM:
                times[name].append(value)
    return times


def _rows(title: str, times: dict[str, list[float]], hop_us: float | None) -> Rows:
    plain = _quiet(times[_PLAIN])
    rows = []
    for name, values in times.items():
        added = _quiet(values) - plain
        in_hops = () if hop_us is None else (f"{added / hop_us:.1f}",)
        rows.append((name, Repeats([value / 1e3 for value in values]).text(), f"{added:.0f}", *in_hops))
    columns = ("what", "ms", "added, µs", *(() if hop_us is None else ("added, hops",)))
    return Rows(f"{title}; medians of {len(times[_PLAIN])}, and what lower quartiles differ by", columns, rows)


def _quiet(values: list[float]) -> float:
    """Return the lower quartile: what else the machine does only ever adds."""
    return statistics.quantiles(values, n=4)[0]


def _measure_check(model: Any) -> Rows:
    """Measure what a step does for hooks while none is registered: it looks whether one is."""
    num_checks = 1000
    began_s = time.perf_counter()
    for _ in range(num_checks):
        bool(model._hooked_modules)  # noqa: SLF001 - what forward asks
    check_us = (time.perf_counter() - began_s) / num_checks * 1e6
    return Rows("Nothing registered", ("what", "µs"), [("look for hooks, in each step", f"{check_us:.1f}")])

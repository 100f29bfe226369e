"""``python -m benchmarks instruments``: what captures and interventions add to a decode step, and what they add while there are none.

Knows the public face; two texts of one model alternate step by step, one of them with the instruments.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import lingualinked as ll
from lingualinked.cli.bench.shapes import LLAMA_160M
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.tables import Rows

_WARM_UP_STEPS = 8
_LAYERS = "model.layers.*"


def run_instruments(context: int, num_steps: int) -> None:
    """Print a decode step's time with instruments at every layer against the same step without, pair by pair."""
    torch.set_num_threads(1)
    console = new_console()
    plan = ll.Plan.from_spans([("worker-0", 0, 6), ("worker-1", 6, 12)])
    vector = torch.randn(LLAMA_160M["hidden_size"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_160M))
        with (
            ll.Cluster([ll.Device(name=name, threads=1) for name in plan.devices]) as cluster,
            ll.ShardedModel.from_pretrained(
                folder, cluster=cluster, plan=plan, load_format="dummy", progress=False
            ) as model,
        ):
            blocks: dict[str, Callable[[Any], Any]] = {
                "nothing, against itself": lambda _: contextlib.nullcontext(),
                "capture of the last position at every layer": functools.partial(_capture, model),
                "the same in float32": functools.partial(_capture, model, dtype=torch.float32),
                "Add at every layer": functools.partial(_intervene, model, ll.Add(vector)),
                "Project at every layer": functools.partial(_intervene, model, ll.Project(vector)),
            }
            rows = []
            for name, block in blocks.items():
                without, with_it, used = _alternate(model, block, context, num_steps)
                ratio = ratios(with_it, without)
                times = without.text(2, " ms"), with_it.text(2, " ms"), f"{ratio.median:.4f}"
                rows.append((name, *times, f"{used[1] / used[0]:.4f}"))
            console.print(
                Rows(
                    f"A decode step at context {context}, 2 workers x 1 thread, median of {num_steps} pairs",
                    ("instruments", "without", "with", "ratio", "ratio of processor time"),
                    rows,
                )
            )
            asked_us = _idle_us(model)
            step_us = 1e3 * without.median
            console.print(
                f"Nothing registered: {asked_us:.2f} µs to find that out, {100 * asked_us / step_us:.4f} % of a step."
            )


def _capture(model: Any, cache: Any, **arguments: Any) -> Any:
    return model.capture(_LAYERS, positions=-1, scope=cache, **arguments)


def _intervene(model: Any, intervention: Any, cache: Any) -> Any:
    return model.intervene({_LAYERS: intervention}, scope=cache)


@torch.no_grad()
def _alternate(
    model: Any, make_block: Callable[[Any], Any], context: int, num_steps: int
) -> tuple[Repeats, Repeats, list[float]]:
    """Return milliseconds of the steps of two texts, of which the second one has the instruments of a block.

    And the seconds of processor time that caller and workers use for them, which others' load changes little.
    """
    ids = torch.randint(3, LLAMA_160M["vocab_size"], (1, context), generator=torch.Generator().manual_seed(0))
    caches = [model(ids, logits_to_keep=1).past_key_values for _ in range(2)]
    times_ms: list[list[float]] = [[], []]
    processes = [psutil.Process(pid) for pid in (os.getpid(), *model.cluster.pids.values())]
    used_s = [0.0, 0.0]
    with make_block(caches[1]):
        for step in range(_WARM_UP_STEPS + num_steps):
            for index in (0, 1) if step % 2 else (1, 0):
                used_before_s, began_s = _used_s(processes), time.perf_counter()
                model(ids[:, -1:], past_key_values=caches[index])
                if step >= _WARM_UP_STEPS:
                    times_ms[index].append(1e3 * (time.perf_counter() - began_s))
                    used_s[index] += _used_s(processes) - used_before_s
    for cache in caches:
        cache.end()
    return Repeats(times_ms[0]), Repeats(times_ms[1]), used_s


def _used_s(processes: list[psutil.Process]) -> float:
    """Return the seconds of processor time that processes have used."""
    return sum(_run_s(thread.id, process.pid) for process in processes for thread in process.threads())


def _run_s(thread: int, pid: int) -> float:
    return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9


def _idle_us(model: Any) -> float:
    """Return microseconds that a call takes to find that nothing is registered."""
    blocks = model._open_blocks  # noqa: SLF001 - what a call asks
    number = 100_000
    return min(timeit.repeat(lambda: bool(blocks), number=number, repeat=5)) / number * 1e6

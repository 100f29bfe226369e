"""``lingualinked bench memory``: what workers and caller hold after many steps, against after few.

Knows processes' memory as the system reports it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from lingualinked.cli.bench.measurement import Measurement
from lingualinked.cli.bench.models import BenchModels
from lingualinked.cli.bench.timing import generate

_WARM_STEPS = 100
_CALL_STEPS = 50
_MIB = 1 << 20


def measure_memory_growth(models: BenchModels, num_steps: int, context: int) -> list[Measurement]:
    """Measure the resident memory of each process after 100 steps and after all; no KV is held at these moments."""
    ids = models.draw_ids(1, context)
    processes = {"caller": psutil.Process()}
    processes |= {name: psutil.Process(pid) for name, pid in models.sharded.cluster.pids.items()}
    held: dict[str, list[float]] = {name: [] for name in processes}
    counts = []
    for count in _answer(models.sharded, ids, num_steps):
        counts.append(count)
        gc.collect()
        for name, process in processes.items():
            held[name].append(process.memory_info().rss / _MIB)
    return [
        Measurement(
            what=f"memory of {name}",
            unit="MiB",
            values={f"after {counts[-1]:,} steps": values[-1:], f"after {counts[0]:,}": values[:1]},
            notes=(f"On the way, each {counts[1] - counts[0]:,} steps: {_series(held)}.",) if name == "caller" else (),
        )
        for name, values in held.items()
    ]


def _answer(model: Any, ids: torch.Tensor, num_steps: int) -> Iterator[int]:
    """Generate answers one after the other, greedily and by sampling; yield the number of steps at each tenth."""
    tenth = max(_WARM_STEPS, num_steps // 10)
    due = _WARM_STEPS
    for number in range(_CALL_STEPS, num_steps + 1, _CALL_STEPS):
        generate(model, ids, _CALL_STEPS, do_sample=bool(number // _CALL_STEPS % 2))
        if number >= due or number == num_steps:
            yield number
            due = number - number % tenth + tenth


def _series(held: dict[str, list[float]]) -> str:
    return "; ".join(f"{name} {', '.join(f'{value:.1f}' for value in values)}" for name, values in held.items())

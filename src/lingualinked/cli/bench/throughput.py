"""``lingualinked bench throughput``: answers to several prompts at once, against one after the other.

Knows models, threads and clocks; alternates all sides in one run.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import torch

from lingualinked.cli.bench.measurement import Measurement, take_turns
from lingualinked.cli.bench.models import BenchModels
from lingualinked.cli.bench.peers.sides import peer_sides
from lingualinked.cli.bench.timing import generate
from lingualinked.quantities import count_text


def measure_sessions(models: BenchModels, num_sessions: int, context: int, new_tokens: int) -> list[Measurement]:
    """Measure so many threads that call `generate` at once, against one after the other."""
    prompts = [models.draw_ids(1, context, seed) for seed in range(num_sessions)]
    one_by_one = "one after the other"

    def measure(model: Any, num_threads: int = 1) -> float:
        return answers_tokens_per_s(model, prompts, new_tokens, num_threads)

    sides: dict[str, Callable[[], float]] = {
        "sharded": lambda: measure(models.sharded, num_sessions),
        one_by_one: lambda: measure(models.sharded),
        **models.uncut_sides(measure),
        **peer_sides(models, "throughput", num_sessions, context, new_tokens),
    }
    slowdown = models.options.slowdown
    devices = f"{count_text(len(models.cluster.devices), 'device')}{f' slowed down {slowdown:g} times' if slowdown > 1 else ''}"
    return [
        Measurement(
            what=f"{count_text(num_sessions, 'session')} at once on {devices}, {context:,} + {new_tokens:,} tokens",
            unit="tokens/s",
            values=take_turns(sides, models.options.repeats),
            at_least={one_by_one: 3.6 if slowdown > 1 else 1.7, "llama.cpp": 1.0},
        )
    ]


def answers_tokens_per_s(model: Any, prompts: list[torch.Tensor], new_tokens: int, num_threads: int) -> float:
    """Return new tokens per second of an answer to each prompt, with so many threads that call `generate`."""
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        began_s = time.perf_counter()
        for future in [pool.submit(generate, model, prompt, new_tokens) for prompt in prompts]:
            future.result()
        return len(prompts) * new_tokens / (time.perf_counter() - began_s)

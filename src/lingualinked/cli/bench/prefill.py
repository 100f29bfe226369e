"""``lingualinked bench prefill``: tokens of a prompt per second, whole and in chunks that follow each other.

Knows models and clocks; alternates all sides in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lingualinked.cli.bench.measurement import Measurement, take_turns
from lingualinked.cli.bench.models import BenchModels
from lingualinked.cli.bench.peers.sides import peer_sides
from lingualinked.cli.bench.timing import call_s

_AT_LEAST = {"uncut-2": 0.95, "llama.cpp": 1.0}


def measure_prefill(models: BenchModels, tokens: Sequence[int], chunk_size: int | None) -> list[Measurement]:
    """Measure prompts of so many tokens up to their first new one, against the sides that were asked for."""
    return [_measure_prompt(models, num_tokens, chunk_size) for num_tokens in tokens]


def _measure_prompt(models: BenchModels, num_tokens: int, chunk_size: int | None) -> Measurement:
    ids = models.draw_ids(1, num_tokens)
    chunks: dict[str, Any] = {} if chunk_size is None else {"prefill_chunk_size": chunk_size}

    def measure(model: Any, **arguments: Any) -> float:
        return num_tokens / call_s(model, ids, 1, **arguments)

    sides: dict[str, Callable[[], float]] = {
        "sharded": lambda: measure(models.sharded, **chunks),
        **models.uncut_sides(measure),
    }
    if chunks and "one-step" in models.options.against:
        sides["one-step"] = lambda: measure(models.sharded)
    sides |= peer_sides(models, "prefill", 1, num_tokens, 0)
    return Measurement(
        what=f"prefill of {num_tokens:,} tokens, {'whole' if chunk_size is None else f'chunks of {chunk_size}'}",
        unit="tokens/s",
        values=take_turns(sides, models.options.repeats),
        at_least=_AT_LEAST,
    )

"""``lingualinked bench prefill``: tokens of a prompt per second, whole and in chunks that follow each other.

Knows models and clocks; alternates all sides in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

import lingualinked as ll
from lingualinked.cli.bench.measurement import Measurement, take_turns
from lingualinked.cli.bench.models import BenchModels
from lingualinked.cli.bench.peers.sides import peer_sides
from lingualinked.cli.bench.timing import call_s
from lingualinked.cluster.steps.step_in_flight import StepOptions

_AT_LEAST = {"uncut-2": 0.95, "ideal": 0.9, "llama.cpp": 1.0}

ChunkSize = int | Literal["auto"] | None
"""Tokens of a chunk; None: the prompt is whole."""


def read_chunk_size(text: str) -> ChunkSize:
    """Read ``--chunk-size``: a number, "auto" or "whole"."""
    if text == "auto":
        return "auto"
    if text == "whole":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ll.ArgumentError(f"--chunk-size {text!r} must be a positive number of tokens, auto or whole")
    return int(text)


def measure_prefill(models: BenchModels, tokens: Sequence[int], chunk_size: ChunkSize) -> list[Measurement]:
    """Measure prompts of so many tokens up to their first new one, against the sides that were asked for.

    Prompts in chunks are also measured against the ideal: what each chunk takes alone in each stage, in the order in which chunks
    follow each other, without a moment between them.
    """
    return [_measure_prompt(models, num_tokens, chunk_size) for num_tokens in tokens]


def _measure_prompt(models: BenchModels, num_tokens: int, chunk_size: ChunkSize) -> Measurement:
    ids = models.draw_ids(1, num_tokens)
    chunks: dict[str, Any] = {} if chunk_size is None else {"prefill_chunk_size": chunk_size}

    def measure(model: Any, **arguments: Any) -> float:
        return num_tokens / call_s(model, ids, 1, **arguments)

    sides: dict[str, Callable[[], float]] = {
        "sharded": lambda: measure(models.sharded, **chunks),
        **models.uncut_sides(measure),
    }
    notes = []
    if chunks:
        measure(models.sharded, **chunks)
        used = _chunk_size_used(models.sharded)
        notes.append(
            f"prompts of {num_tokens:,} ran in chunks of {used}; the ideal is made of the times that these take alone"
        )
        sides["ideal"] = lambda: num_tokens / _ideal_s(models.sharded, ids, used)
    if chunks and "one-step" in models.options.against:
        sides["one-step"] = lambda: measure(models.sharded)
    sides |= peer_sides(models, "prefill", 1, num_tokens, 0)
    return Measurement(
        what=f"prefill of {num_tokens:,} tokens, {'whole' if chunk_size is None else f'chunks: {chunk_size}'}",
        unit="tokens/s",
        values=take_turns(sides, models.options.repeats),
        at_least=_AT_LEAST,
        notes=tuple(notes),
    )


def _chunk_size_used(model: Any) -> int:
    """Return the tokens of the first chunk of the prompt that ran last."""
    *_, last = steps = model.telemetry.history.steps
    return int(next(step.tokens for step in steps if step.session == last.session))


def _ideal_s(model: Any, ids: torch.Tensor, chunk_size: int) -> float:
    """Run a prompt chunk by chunk, one after the other; return the seconds in which stages without pauses would run it."""
    first, *others = ids.split(chunk_size, dim=1)
    past = model(first, logits_to_keep=1).past_key_values
    ends_s = [0.0] * len(model.plan.stages)
    for number, chunk in enumerate([first, *others]):
        if number:
            options = StepOptions(wants_logits=number == len(others))
            past.session.start_step(chunk, None, None, 1, options).finish()
        ready_s = 0.0
        for index, stage in enumerate(past.session.last_step.stages):
            ready_s = ends_s[index] = max(ready_s, ends_s[index]) + stage.compute_s
    past.end()
    return ends_s[-1]

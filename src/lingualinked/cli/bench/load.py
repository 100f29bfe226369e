"""``lingualinked bench load``: many requests of different lengths at once, by continuous batching.

Knows models and clocks; alternates all sides in one run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from lingualinked.cli.bench.measurement import Measurement, take_turns
from lingualinked.cli.bench.models import BenchModels
from lingualinked.cli.bench.timing import generate
from lingualinked.quantities import count_text

_BATCH = 16


def measure_load(
    models: BenchModels, num_requests: int, prompt_tokens: tuple[int, int], new_tokens: int
) -> list[Measurement]:
    """Measure `generate_batch` of mixed prompts, against uncut left-padded batches and one prompt after the other."""
    rng = random.Random(0)  # noqa: S311 - lengths, no secret
    prompts = [models.draw_ids(1, rng.randint(*prompt_tokens), seed) for seed in range(num_requests)]
    one_by_one = "one after the other"

    def timed(answer: Callable[[Any], object], model: Any) -> float:
        began_s = time.perf_counter()
        answer(model)
        return num_requests * new_tokens / (time.perf_counter() - began_s)

    def one_after_the_other(model: Any) -> None:
        for prompt in prompts:
            generate(model, prompt, new_tokens)

    def in_padded_batches(model: Any) -> None:
        for start in range(0, num_requests, _BATCH):
            ids, mask = _pad_left(prompts[start : start + _BATCH])
            generate(model, ids, new_tokens, attention_mask=mask)

    def continuously(model: Any) -> None:
        from transformers import GenerationConfig

        config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0)
        model.generate_batch([prompt[0].tolist() for prompt in prompts], generation_config=config, progress_bar=False)

    sides: dict[str, Callable[[], float]] = {
        "sharded": lambda: timed(continuously, models.sharded),
        **models.uncut_sides(lambda model: timed(in_padded_batches, model)),
        one_by_one: lambda: timed(one_after_the_other, models.sharded),
    }
    low, high = prompt_tokens
    return [
        Measurement(
            what=f"{count_text(num_requests, 'request')} of {low} to {count_text(high, 'token')}, {new_tokens:,} new ones each",
            unit="tokens/s",
            values=take_turns(sides, models.options.repeats, num_warm=0),
            at_least={"uncut-2": 1.5, one_by_one: 6.0},
            notes=(f"The uncut model answers in left-padded batches of {_BATCH}.",),
        )
    ]


def _pad_left(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as one batch, padded at their beginnings, and its mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.shape[1] :] = prompt[0]
        mask[row, -prompt.shape[1] :] = 1
    return ids, mask

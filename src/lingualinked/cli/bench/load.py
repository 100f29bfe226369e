"""``lingualinked bench load``: many requests of different lengths at once, by continuous batching.

Knows models and clocks; alternates all sides in one run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from lingualinked.cli.bench.measurement import Measurement, take_turns
from lingualinked.cli.bench.models import BenchModels
from lingualinked.cli.bench.timing import generate
from lingualinked.errors import LingualinkedError
from lingualinked.quantities import count_text

_BATCH = 16
_ONE_BY_ONE = "one after the other"

Answer = Callable[[Any, list[torch.Tensor], int], list[list[int]]]
"""Answers prompts with a model; returns the new tokens of each."""


def measure_load(
    models: BenchModels, num_requests: int, prompt_tokens: tuple[int, int], new_tokens: int
) -> list[Measurement]:
    """Measure `generate_batch` of mixed prompts, against uncut left-padded batches and one prompt after the other."""
    rng = random.Random(0)  # noqa: S311 - lengths, no secret
    prompts = [models.draw_ids(1, rng.randint(*prompt_tokens), seed) for seed in range(num_requests)]
    tokens: dict[Answer, list[list[int]]] = {}

    def timed(answer: Answer, model: Any) -> float:
        began_s = time.perf_counter()
        tokens[answer] = answer(model, prompts, new_tokens)
        return num_requests * new_tokens / (time.perf_counter() - began_s)

    sides: dict[str, Callable[[], float]] = {
        "sharded": lambda: timed(_answer_together, models.sharded),
        **models.uncut_sides(lambda model: timed(_answer_padded, model)),
        _ONE_BY_ONE: lambda: timed(_answer_one_by_one, models.sharded),
    }
    _answer_together(models.sharded, prompts[:2], new_tokens)  # what is made at the first call is not timed
    values = take_turns(sides, models.options.repeats, num_warm=0)
    together, one_by_one = tokens[_answer_together], tokens[_answer_one_by_one]
    num_equal = sum(ours == theirs for ours, theirs in zip(together, one_by_one, strict=True))
    low, high = prompt_tokens
    return [
        Measurement(
            what=f"{count_text(num_requests, 'request')} of {low} to {count_text(high, 'token')}, {new_tokens:,} new ones each",
            unit="tokens/s",
            values=values,
            at_least={"uncut-2": 1.5, _ONE_BY_ONE: 6.0},
            notes=(
                f"The uncut model answers in left-padded batches of {_BATCH}.",
                f"All tokens of {num_equal} of {count_text(num_requests, 'request')} are those of one after the other.",
            ),
        )
    ]


def _answer_together(model: Any, prompts: list[torch.Tensor], new_tokens: int) -> list[list[int]]:
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0)
    texts = [prompt[0].tolist() for prompt in prompts]
    outputs = model.generate_batch(texts, generation_config=config, progress_bar=False)
    for output in outputs.values():
        if output.error:
            raise LingualinkedError(f"request {output.request_id} has failed: {output.error}")
    return [list(output.generated_tokens) for output in outputs.values()]


def _answer_one_by_one(model: Any, prompts: list[torch.Tensor], new_tokens: int) -> list[list[int]]:
    return [generate(model, prompt, new_tokens)[0, prompt.shape[1] :].tolist() for prompt in prompts]


def _answer_padded(model: Any, prompts: list[torch.Tensor], new_tokens: int) -> list[list[int]]:
    answers: list[list[int]] = []
    for start in range(0, len(prompts), _BATCH):
        ids, mask = _pad_left(prompts[start : start + _BATCH])
        answers += generate(model, ids, new_tokens, attention_mask=mask)[:, ids.shape[1] :].tolist()
    return answers


def _pad_left(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as one batch, padded at their beginnings, and its mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.shape[1] :] = prompt[0]
        mask[row, -prompt.shape[1] :] = 1
    return ids, mask

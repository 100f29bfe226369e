"""Many prompts at once: tokens of transformers' own continuous batching and of each prompt alone, whatever happens meanwhile."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from waiting import num_sessions, wait_until

pytestmark = pytest.mark.process

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
SMALL = ContinuousBatchingConfig(num_blocks=16, page_size=64, max_batch_tokens=64)  # else it takes half of the memory


def make_prompts(number: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, *rng.choices(range(3, 128), k=rng.randint(1, longest))] for _ in range(number)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Nothing of a batch is left when it has ended."""
    yield
    assert not [each.name for each in threading.enumerate() if each.name.startswith("lingualinked-batching")]


@functools.cache
def alone(model: PreTrainedModel, prompt: tuple[int, ...], max_new_tokens: int = 12) -> list[int]:
    settings = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, **settings)
    return ids[0, len(prompt) :].tolist()


def tokens(outputs: dict[str, GenerationOutput]) -> list[list[int]]:
    assert [each.error for each in outputs.values()] == [None] * len(outputs)
    return [each.generated_tokens for each in outputs.values()]


def test_tokens_are_those_of_transformers_and_of_each_prompt_alone(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = make_prompts(8)
    ours = sharded.generate_batch(prompts, GREEDY)
    theirs = unsharded.generate_batch(prompts, GREEDY, SMALL)
    assert tokens(ours) == tokens(theirs) == [alone(unsharded, tuple(prompt)) for prompt in prompts]
    assert list(ours) == list(theirs)
    for name, output in ours.items():
        assert type(output) is GenerationOutput
        assert output.prompt_ids == theirs[name].prompt_ids
        assert output.status == RequestStatus.FINISHED
        assert 0 < output.created_time <= output.lifespan[0] < output.lifespan[1]
    wait_until(lambda: num_sessions(sharded) == [0, 0, 0])


def test_hundreds_of_prompts(sharded: Any, unsharded: PreTrainedModel) -> None:
    prompts = make_prompts(200, longest=12)
    outputs = sharded.generate_batch(prompts, GREEDY, max_new_tokens=4)
    assert tokens(outputs) == [alone(unsharded, tuple(prompt), 4) for prompt in prompts]

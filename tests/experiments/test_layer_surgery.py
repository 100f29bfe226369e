"""What a model does without some of its layers: they are deleted from its list, or left out of a new one, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from both_models import BothModels

pytestmark = pytest.mark.process

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@contextmanager
def kept(model: Any, indices: Sequence[int]) -> Iterator[None]:
    """Leave these layers alone in a model."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[index] for index in indices])
    yield
    model.model.layers = layers


@torch.no_grad()
def short_gpt(model: Any, input_ids: Tensor, num_removed: int) -> tuple[list[int], Tensor, Tensor]:
    """Men et al. (2024), "ShortGPT": the layers that turn the residual stream least are removed."""
    states = model(input_ids, output_hidden_states=True).hidden_states
    influence = torch.stack(
        [1 - functional.cosine_similarity(states[n], states[n + 1], dim=-1).mean() for n in range(4)]
    )
    removed = influence.argsort()[:num_removed].tolist()
    layers = list(model.model.layers)
    for index in sorted(removed, reverse=True):
        del model.model.layers[index]
    loss, tokens = (
        model(input_ids, labels=input_ids, use_cache=False).loss,
        model.generate(input_ids, use_cache=False, **GREEDY),
    )
    for index in sorted(removed):
        model.model.layers.insert(index, layers[index])
    return removed, loss, tokens


def test_short_gpt(llama: BothModels, prompts: Tensor) -> None:
    removed, loss, tokens = llama.run(short_gpt, prompts, num_removed=2)
    assert len(removed) == 2
    assert loss != llama.uncut(prompts, labels=prompts).loss
    assert not torch.equal(tokens, llama.uncut.generate(prompts, **GREEDY))


@torch.no_grad()
def redundancy_verification(model: Any, input_ids: Tensor, num_left: int) -> list[tuple[list[int], Tensor]]:
    """Song et al. (2024), "SLEB": again and again the layer is eliminated that the loss needs least."""
    left, steps = list(range(len(model.model.layers))), []
    while len(left) > num_left:
        losses = {}
        for index in left:
            with kept(model, [each for each in left if each != index]):
                losses[index] = model(input_ids, labels=input_ids, use_cache=False).loss
        left.remove(min(losses, key=lambda index: float(losses[index])))
        steps.append((list(left), min(losses.values())))
    return steps


def test_redundancy_verification(mixtral: BothModels, prompts: Tensor) -> None:
    steps = mixtral.run(redundancy_verification, prompts, num_left=2)
    assert [len(left) for left, _ in steps] == [3, 2]
    assert steps[0][1] != steps[1][1]


@torch.no_grad()
def self_speculative_drafts(
    model: Any, input_ids: Tensor, num_layers: int, num_drafted: int = 3
) -> tuple[Tensor, Tensor]:
    """Elhoushi et al. (2024), "LayerSkip": the first layers draft tokens, and all of them verify these in one pass."""
    draft = input_ids
    with kept(model, range(num_layers)):
        for _ in range(num_drafted):
            token = model(draft, use_cache=False).logits[:, -1:].argmax(-1)
            draft = torch.cat([draft, token], dim=1)
    verified = model(draft, use_cache=False).logits[:, -num_drafted - 1 : -1].argmax(-1)
    accepted = (draft[:, -num_drafted:] == verified).long().cumprod(1).sum(1)
    return draft, accepted


def test_self_speculative_drafts(qwen3: BothModels, prompts: Tensor) -> None:
    draft, accepted = qwen3.run(self_speculative_drafts, prompts, num_layers=3)
    assert not torch.equal(draft, qwen3.uncut.generate(prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False))
    assert accepted.max() <= 3

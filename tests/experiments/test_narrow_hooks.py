"""Experiments whose functions need a part of a call: `ll.hook` sends only that of a sharded model; plain hooks on the uncut one.

Each has two forms, with the same function in both. It decides by what it sees, which data alone can't.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessorList

import lingualinked as ll
from both_models import BothModels

pytestmark = pytest.mark.process

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


class ConditionalSteering:
    """Lee et al. (2024), "Programming Refusal with Conditional Activation Steering": rows that meet a condition are steered."""

    def __init__(self, condition: Tensor, vector: Tensor) -> None:
        self.condition, self.vector, self.met = condition, vector, []

    def __call__(self, last: Tensor) -> Tensor:
        similarity = functional.cosine_similarity(last, self.condition, dim=-1)
        self.met.append(similarity > 0)
        return torch.where(self.met[-1][..., None], last + self.vector, last)


def conditional_steering(
    model: Any, input_ids: Tensor, condition: Tensor, vector: Tensor
) -> tuple[Tensor, list[Tensor]]:
    steer = ConditionalSteering(condition, vector)
    with ll.hook(model.model.layers[1], steer, positions=-1):
        return model.generate(input_ids, **GREEDY), steer.met


def conditional_steering_by_plain_hooks(model: Any, input_ids: Tensor, condition: Tensor, vector: Tensor) -> Any:
    steer = ConditionalSteering(condition, vector)

    def change(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], steer(output[:, -1])[:, None]], dim=1)

    with model.model.layers[1].register_forward_hook(change):
        return model.generate(input_ids, **GREEDY), steer.met


def test_conditional_steering(llama: BothModels, prompts: Tensor) -> None:
    data = (prompts, torch.linspace(-1, 1, 32), 4 * torch.cos(torch.arange(32)))
    said, met = llama.run_each(conditional_steering, conditional_steering_by_plain_hooks, *data)
    plain = llama.uncut.generate(prompts, **GREEDY)
    assert 0 < met[0].sum() < 8
    assert (said != plain).any(1)[met[0]].any()


class NearestNeighbours:
    """Khandelwal et al. (2020), "Generalization through Memorization": states of texts, with the token that came next."""

    def __init__(self) -> None:
        self.query = torch.empty(0)
        self.keys = self.query
        self.tokens = torch.empty(0, dtype=torch.long)

    def remember(self, states: Tensor, input_ids: Tensor) -> None:
        self.keys, self.tokens = states[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()

    def look(self, last: Tensor) -> None:
        self.query = last

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        distances, nearest = torch.cdist(self.query, self.keys).topk(8, largest=False)
        weights = (-distances).softmax(-1)
        neighbours = torch.zeros_like(scores).scatter_add(1, self.tokens[nearest], weights)
        return (0.3 * scores.softmax(-1) + 0.7 * neighbours).log()


@torch.no_grad()
def nearest_neighbour_language_model(model: Any, texts: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    memory = NearestNeighbours()
    with ll.hook(model.model.layers[3].mlp, lambda states: memory.remember(states, texts), wants="input"):
        model(texts)
    with ll.hook(model.model.layers[3].mlp, memory.look, wants="input", positions=-1):
        said = model.generate(input_ids, logits_processor=LogitsProcessorList([memory]), **GREEDY)
    return memory.keys, said


@torch.no_grad()
def nearest_neighbours_by_plain_hooks(model: Any, texts: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    memory, mlp = NearestNeighbours(), model.model.layers[3].mlp
    with mlp.register_forward_pre_hook(lambda _m, args: memory.remember(args[0], texts)):
        model(texts)
    with mlp.register_forward_pre_hook(lambda _m, args: memory.look(args[0][:, -1])):
        said = model.generate(input_ids, logits_processor=LogitsProcessorList([memory]), **GREEDY)
    return memory.keys, said


def test_nearest_neighbour_language_model(qwen3: BothModels, prompts: Tensor) -> None:
    data = (prompts[:5], prompts[5:])
    _, said = qwen3.run_each(nearest_neighbour_language_model, nearest_neighbours_by_plain_hooks, *data)
    assert not torch.equal(said, qwen3.uncut.generate(prompts[5:], **GREEDY))


class KeptError:
    """Marks et al. (2024), "Sparse Feature Circuits": a dictionary explains an MLP, and what it leaves out is kept."""

    def __init__(self, dropped: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.encoder, self.decoder = (torch.randn(shape, generator=generator) / 8 for shape in ((32, 64), (64, 32)))
        self.dropped = dropped

    def __call__(self, states: Tensor, output: Tensor) -> Tensor:
        features = (states @ self.encoder).relu()
        error = output - features @ self.decoder
        features[..., self.dropped] = 0
        return features @ self.decoder + error


@torch.no_grad()
def feature_effect(model: Any, input_ids: Tensor, dropped: int) -> Tensor:
    with ll.hook(model.transformer.h[1].mlp, KeptError(dropped), wants="both"):
        return model(input_ids).logits


@torch.no_grad()
def feature_effect_by_plain_hooks(model: Any, input_ids: Tensor, dropped: int) -> Tensor:
    replace = KeptError(dropped)
    with model.transformer.h[1].mlp.register_forward_hook(lambda _m, args, output: replace(args[0], output)):
        return model(input_ids).logits


def test_effects_of_features(gpt2: BothModels, prompts: Tensor) -> None:
    effects = [
        gpt2.run_each(feature_effect, feature_effect_by_plain_hooks, prompts, dropped=feature) for feature in (3, 7)
    ]
    assert not torch.equal(*effects)

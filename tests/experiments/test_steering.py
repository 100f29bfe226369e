"""What a model says when something is added to what it thinks: steering vectors and the like, during ``generate``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from both_models import BothModels

pytestmark = pytest.mark.process

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@torch.no_grad()
def activation_addition(model: Any, input_ids: Tensor, love: Tensor, hate: Tensor, scale: float) -> Tensor:
    """Turner et al. (2023), "Steering Language Models With Activation Engineering": a pair of prompts, at the first tokens."""
    block = model.transformer.h[2]
    states: list[Tensor] = []
    with block.register_forward_pre_hook(lambda _module, args: states.append(args[0])):
        model(love)
        model(hate)
    vector = scale * (states[0] - states[1])

    def add(_module: Any, args: Any) -> Any:
        if args[0].shape[1] > 1:
            args[0][:, : vector.shape[1]] += vector
        return args

    with block.register_forward_pre_hook(add):
        return model.generate(input_ids, **GREEDY)


def test_activation_addition(bloom: BothModels, prompts: Tensor) -> None:
    steered = bloom.run(activation_addition, prompts[:4], prompts[4:5, :4], prompts[5:6, :4], scale=5.0)
    assert not torch.equal(steered, bloom.uncut.generate(prompts[:4], **GREEDY))


@torch.no_grad()
def contrastive_activation_addition(
    model: Any, positive: Tensor, negative: Tensor, input_ids: Tensor, layer: int, scale: float, **arguments: Any
) -> Tensor:
    """Rimsky et al. (2024), "Steering Llama 2 via Contrastive Activation Addition": a mean difference, at every new token."""
    last = [model(ids, output_hidden_states=True).hidden_states[layer + 1][:, -1] for ids in (positive, negative)]
    vector = (last[0] - last[1]).mean(0)
    with model.model.layers[layer].register_forward_hook(lambda _m, _args, output: output + scale * vector):
        return model.generate(input_ids, **arguments)


@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}]
)
def test_contrastive_activation_addition(gemma2: BothModels, prompts: Tensor, sampling: dict[str, Any]) -> None:
    arguments = {**GREEDY, **sampling}
    data = (prompts[:3], prompts[3:6], prompts[6:])
    up, down = (gemma2.run(contrastive_activation_addition, *data, 2, scale, **arguments) for scale in (4.0, -4.0))
    assert not torch.equal(up, down)


@torch.no_grad()
def representation_reading(
    model: Any, first: Tensor, second: Tensor, input_ids: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Zou et al. (2023), "Representation Engineering": principal directions of differences, to read with and to control."""
    states = [model(ids, output_hidden_states=True).hidden_states[1:] for ids in (first, second)]
    directions = []
    for positive, negative in zip(*states, strict=True):
        differences = positive[:, -1] - negative[:, -1]
        differences = differences - differences.mean(0)
        directions.append(torch.linalg.svd(differences, full_matrices=False).Vh[0])
    read = model(input_ids, output_hidden_states=True).hidden_states[1:]
    scores = torch.stack([each @ direction for each, direction in zip(read, directions, strict=True)])
    with ExitStack() as hooks:
        for layer, direction in zip(model.model.layers, directions, strict=True):
            hooks.enter_context(layer.register_forward_hook(lambda _m, _a, output, add=4 * direction: output + add))
        controlled = model.generate(input_ids, **GREEDY)
    return directions, scores, controlled


def test_representation_reading_and_control(llama: BothModels, prompts: Tensor) -> None:
    _, scores, controlled = llama.run(representation_reading, prompts[:3], prompts[3:6], prompts[6:])
    assert scores.shape == (4, 2, 9)
    assert not torch.equal(controlled, llama.uncut.generate(prompts[6:], **GREEDY))


@torch.no_grad()
def inference_time_intervention(model: Any, true: Tensor, false: Tensor, input_ids: Tensor, num_heads: int = 3) -> Any:
    """Li et al. (2023), "Inference-Time Intervention": the heads that tell truth best are shifted along it."""
    head_dim = model.config.head_dim
    mixed: dict[int, list[Tensor]] = {index: [] for index in range(len(model.model.layers))}
    with ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):
            keep = mixed[index].append
            hooks.enter_context(
                layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args, keep=keep: keep(args[0][:, -1]))
            )
        model(true)
        model(false)
    found = []
    for index, (yes, no) in mixed.items():
        for head in range(model.config.num_attention_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            direction = yes[:, part].mean(0) - no[:, part].mean(0)
            direction = direction / direction.norm()
            along = torch.cat([yes[:, part], no[:, part]]) @ direction
            separation = (along[: len(yes)].mean() - along[len(yes) :].mean()) / along.std()
            found.append((float(separation), index, part, direction * along.std()))
    best = sorted(found, key=lambda each: each[0])[-num_heads:]

    def shift(index: int) -> Any:
        def change(_module: Any, args: Any) -> Any:
            shifted = args[0].clone()
            for _, layer, part, direction in best:
                if layer == index:
                    shifted[:, -1, part] += 15 * direction
            return (shifted,)

        return change

    with ExitStack() as hooks:
        for index in {layer for _, layer, _, _ in best}:
            hooks.enter_context(model.model.layers[index].self_attn.o_proj.register_forward_pre_hook(shift(index)))
        return [each[:2] for each in best], model.generate(input_ids, **GREEDY)


def test_inference_time_intervention(qwen3: BothModels, prompts: Tensor) -> None:
    _, said = qwen3.run(inference_time_intervention, prompts[:3], prompts[3:6], prompts[6:])
    assert not torch.equal(said, qwen3.uncut.generate(prompts[6:], **GREEDY))


@torch.no_grad()
def function_vector(model: Any, in_context: Tensor, zero_shot: Tensor, heads: list[tuple[int, int]], layer: int) -> Any:
    """Todd et al. (2024), "Function Vectors in Large Language Models": what a few heads write, averaged over prompts, is a task."""
    head_dim = model.config.n_embd // model.config.n_head
    mixed: list[Tensor] = []
    with ExitStack() as hooks:
        for block in model.transformer.h:
            hooks.enter_context(
                block.attn.c_proj.register_forward_pre_hook(lambda _m, args: mixed.append(args[0][:, -1].mean(0)))
            )
        model(in_context)
    vector = torch.zeros(model.config.n_embd)
    for index, head in heads:
        part = slice(head * head_dim, (head + 1) * head_dim)
        vector += mixed[index][part] @ model.transformer.h[index].attn.c_proj.weight[part]

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output[:, -1] += vector
        return output

    with model.transformer.h[layer].register_forward_hook(add):
        return vector, model(zero_shot).logits[:, -1]


def test_function_vectors(gpt2: BothModels, prompts: Tensor) -> None:
    _, logits = gpt2.run(function_vector, prompts[:5], prompts[5:, :3], [(1, 0), (1, 3), (2, 2)], layer=2)
    assert not torch.equal(logits, gpt2.uncut(prompts[5:, :3]).logits[:, -1])


@torch.no_grad()
def task_vector(model: Any, demonstrations: Tensor, query: Tensor, layer: int) -> Tensor:
    """Hendel et al. (2023), "In-Context Learning Creates Task Vectors": the last state after examples replaces the query's."""
    task = model(demonstrations, output_hidden_states=True).hidden_states[layer + 1][:, -1].mean(0)

    def replace(_module: Any, _args: Any, output: Tensor) -> Tensor:
        patched = output.clone()
        if output.shape[1] > 1:
            patched[:, -1] = task
        return patched

    with model.model.layers[layer].register_forward_hook(replace):
        return model.generate(query, **GREEDY)


def test_task_vectors(mixtral: BothModels, prompts: Tensor) -> None:
    said = [mixtral.run(task_vector, prompts[:4], prompts[4:, :4], layer=layer) for layer in (0, 2)]
    assert not torch.equal(*said)


@torch.no_grad()
def guided_and_steered(model: Any, input_ids: Tensor, negative: Tensor, vector: Tensor | float) -> Tensor:
    """Sanchez et al. (2023), "Stay on topic with Classifier-Free Guidance": two prompts against each other, both steered."""
    with model.model.layers[1].register_forward_hook(lambda _m, _args, output: output + vector):
        return model.generate(input_ids, guidance_scale=1.7, negative_prompt_ids=negative, **GREEDY)


def test_classifier_free_guidance_with_steering(llama: BothModels, prompts: Tensor) -> None:
    vector = torch.linspace(-1, 1, 32)
    steered = llama.run(guided_and_steered, prompts[:2], prompts[2:4, :5], vector)
    assert not torch.equal(steered, llama.uncut.generate(prompts[:2], **GREEDY))
    assert not torch.equal(steered, llama.run(guided_and_steered, prompts[:2], prompts[2:4, :5], 0.0))


@torch.no_grad()
def conceptor_steering(
    model: Any, concept: Tensor, input_ids: Tensor, layer: int, aperture: float
) -> tuple[Tensor, Tensor]:
    """Postmus & Abreu (2024), "Steering Large Language Models using Conceptors": a soft projection on a concept's states."""
    states = model(concept, output_hidden_states=True).hidden_states[layer + 1].flatten(0, 1)
    correlation = states.T @ states / len(states)
    conceptor = torch.linalg.solve(correlation + aperture**-2 * torch.eye(len(correlation)), correlation)
    with model.model.layers[layer].register_forward_hook(lambda _m, _args, output: 2 * output @ conceptor.T):
        return conceptor, model.generate(input_ids, **GREEDY)


def test_conceptor_steering(llama: BothModels, prompts: Tensor) -> None:
    _, steered = llama.run(conceptor_steering, prompts[:5], prompts[5:], layer=1, aperture=0.5)
    assert not torch.equal(steered, llama.uncut.generate(prompts[5:], **GREEDY))


class WrappedBlock(nn.Module):
    """A layer with a controller around it, as in the code of Zou et al. (2023) and of Rimsky et al. (2024)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.add: Tensor | None = None
        self.last: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        self.last = output.detach().clone()
        return output if self.add is None else output + self.add


@torch.no_grad()
def wrapped_blocks(
    model: Any, positive: Tensor, negative: Tensor, input_ids: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    """Zou et al. (2023); Rimsky et al. (2024): their code puts a module in place of a layer, which calls it."""
    block = model.model.layers[layer]
    wrapped = WrappedBlock(block)
    model.model.layers[layer] = wrapped
    last = []
    for ids in (positive, negative):
        model(ids)
        last.append(wrapped.last[:, -1])
    wrapped.add = 3 * (last[0] - last[1]).mean(0)
    said = model.generate(input_ids, **GREEDY)
    model.model.layers[layer] = block
    return wrapped.add, said


def test_wrapped_blocks(llama: BothModels, prompts: Tensor) -> None:
    _, said = llama.run(wrapped_blocks, prompts[:3], prompts[3:6], prompts[6:], layer=1)
    assert not torch.equal(said, llama.uncut.generate(prompts[6:], **GREEDY))

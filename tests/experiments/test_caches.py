"""Experiments on what follows a prefix that is computed once: its KV is kept, and only the continuation is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from both_models import BothModels

pytestmark = pytest.mark.process


@torch.no_grad()
def patched_continuations(model: Any, prefix: Tensor, suffixes: Tensor, layer: int) -> list[Tensor]:
    """Patching between continuations of one prefix, each from a copy of its KV."""
    cache = model(prefix).past_key_values
    states: list[Tensor] = []
    with model.model.layers[layer].register_forward_hook(lambda _m, _args, output: states.append(output)):
        model(suffixes[:1], past_key_values=copy.deepcopy(cache))
    logits = []
    for position in range(suffixes.shape[1]):

        def patch(_module: Any, _args: Any, output: Tensor, position: int = position) -> Tensor:
            output[:, position] = states[0][:, position]
            return output

        with model.model.layers[layer].register_forward_hook(patch):
            logits.append(model(suffixes[1:], past_key_values=copy.deepcopy(cache)).logits)
    return logits


def test_patched_continuations(llama: BothModels, prompts: Tensor) -> None:
    logits = llama.run(patched_continuations, prompts[:1], prompts[1:3, :4], layer=1)
    assert not any(torch.equal(logits[0], each) for each in logits[1:])


@torch.no_grad()
def steered_from_a_point(model: Any, input_ids: Tensor, num_plain: int, num_steered: int) -> tuple[Tensor, Tensor]:
    """A text is steered from some token on: the KV before it was made without, that after it with the vector."""
    plain = model.generate(input_ids, max_new_tokens=num_plain, min_new_tokens=num_plain, do_sample=False)
    cache = model(plain[:, :-1]).past_key_values
    vector = torch.linspace(-3, 3, model.config.hidden_size)
    tokens, logits = [plain[:, -1:]], []
    with model.model.layers[0].register_forward_hook(lambda _m, _args, output: output + vector):
        for _ in range(num_steered):
            output = model(tokens[-1], past_key_values=cache)
            logits.append(output.logits)
            tokens.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1), torch.cat(logits, dim=1)


def test_steered_from_a_point(qwen3: BothModels, prompts: Tensor) -> None:
    tokens, _ = qwen3.run(steered_from_a_point, prompts, num_plain=2, num_steered=4)
    plain = qwen3.uncut.generate(prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert not torch.equal(tokens[:, 1:], plain[:, -4:])


@torch.no_grad()
def corrupted_context(model: Any, context: Tensor, question: Tensor, layer: int) -> list[Tensor]:
    """A context is read with an ablation, and the question about it without: what was written to KV is what changes."""
    logits = []
    for factor in (1.0, 0.0):
        with model.model.layers[layer].self_attn.register_forward_hook(
            lambda _m, _args, output, factor=factor: (factor * output[0], *output[1:])
        ):
            cache = model(context).past_key_values
        logits.append(model(question, past_key_values=cache).logits)
    return logits


def test_corrupted_context(mixtral: BothModels, prompts: Tensor) -> None:
    clean, corrupted = mixtral.run(corrupted_context, prompts, prompts[:, :3], layer=1)
    assert not torch.equal(clean, corrupted)

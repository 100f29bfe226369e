"""Where heads look: what the attention weights of every layer say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from both_models import BothModels

pytestmark = pytest.mark.process


@torch.no_grad()
def induction_scores(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Olsson et al. (2022), "In-context Learning and Induction Heads": looking behind the earlier copy of a repeated token."""
    length = input_ids.shape[1]
    output = model(torch.cat([input_ids, input_ids], dim=1), output_attentions=True)
    induction, previous = [], []
    for weights in output.attentions:  # (batch, head, query, key)
        induction.append(weights.diagonal(1 - length, -2, -1)[..., 1:].mean((0, 2)))
        previous.append(weights.diagonal(-1, -2, -1).mean((0, 2)))
    return torch.stack(induction), torch.stack(previous)


def test_induction_heads(gpt2: BothModels, qwen3: BothModels, prompts: Tensor) -> None:
    for models in (gpt2, qwen3):
        induction, previous = models.run(induction_scores, prompts)
        assert induction.shape == previous.shape == (4, 4)
        assert induction.unique().numel() == 16


@torch.no_grad()
def attention_rollout(model: Any, input_ids: Tensor) -> Tensor:
    """Abnar & Zuidema (2020), "Quantifying Attention Flow in Transformers": how much of each token reaches each state."""
    reached = torch.eye(input_ids.shape[1])
    for weights in model(input_ids, output_attentions=True).attentions:
        mixed = 0.5 * weights.mean(1) + 0.5 * torch.eye(input_ids.shape[1])
        reached = mixed @ reached
    return reached


def test_attention_rollout(gpt2: BothModels, prompts: Tensor) -> None:
    reached = gpt2.run(attention_rollout, prompts)
    assert torch.allclose(reached.sum(-1), torch.ones(8, 9))
    assert (reached[:, -1] > 0).all()


@torch.no_grad()
def attention_entropy(model: Any, input_ids: Tensor) -> Tensor:
    """Zhai et al. (2023), "Stabilizing Transformer Training by Preventing Attention Entropy Collapse": of heads, at each token.

    Here of what is generated: each step has the weights of one query.
    """
    output = model.generate(
        input_ids,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    return torch.stack(
        [
            torch.stack([torch.special.entr(weights[:, :, -1]).sum(-1).mean(0) for weights in step])
            for step in output.attentions
        ]
    )


def test_attention_entropy(qwen3: BothModels, prompts: Tensor) -> None:
    entropy = qwen3.run(attention_entropy, prompts)
    assert entropy.shape == (5, 4, 4)
    assert (entropy > 0).all()


@torch.no_grad()
def attention_sinks(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Xiao et al. (2023), "Efficient Streaming Language Models with Attention Sinks": weight on the first token, without it."""
    first = torch.stack(
        [weights[..., 1:, 0].mean((0, 2)) for weights in model(input_ids, output_attentions=True).attentions]
    )
    mask = torch.ones_like(input_ids)
    mask[:, 0] = 0
    without = model(input_ids, attention_mask=mask, output_attentions=True)
    assert all((weights[..., 1:, 0] == 0).all() for weights in without.attentions)
    return first, without.logits


def test_attention_sinks(gpt2: BothModels, prompts: Tensor) -> None:
    first, without = gpt2.run(attention_sinks, prompts)
    assert (first > 0).all()
    assert not torch.equal(without, gpt2.uncut(prompts).logits)


@torch.no_grad()
def value_weighted_attention(model: Any, input_ids: Tensor) -> Tensor:
    """Kobayashi et al. (2020), "Attention is Not Only a Weight": norms of what is moved, not how much is looked at."""
    config, num_tokens = model.config, input_ids.shape[1]
    values: list[Tensor] = []
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _args, output: values.append(output))
        for layer in model.model.layers
    ]
    output = model(input_ids, output_attentions=True)
    for handle in handles:
        handle.remove()
    norms = []
    for layer, weights, value in zip(model.model.layers, output.attentions, values, strict=True):
        heads = value.view(len(input_ids), num_tokens, -1, config.head_dim)
        heads = heads.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=2)
        projection = layer.self_attn.o_proj.weight.view(-1, config.num_attention_heads, config.head_dim)
        moved = torch.einsum("bkhd,ehd->bhke", heads, projection).norm(dim=-1)
        norms.append(weights * moved[:, :, None])
    return torch.stack(norms)


def test_value_weighted_attention(qwen3: BothModels, prompts: Tensor) -> None:
    norms = qwen3.run(value_weighted_attention, prompts)
    assert norms.shape == (4, 8, 4, 9, 9)
    assert (norms[..., -1, :] > 0).all()


@torch.no_grad()
def attention_temperature(model: Any, input_ids: Tensor, factor: float) -> list[Tensor]:
    """Veličković et al. (2024), "softmax is not enough (for sharp out-of-distribution)": queries are scaled by a hook."""
    with model.model.layers[1].self_attn.q_norm.register_forward_hook(lambda _m, _args, output: factor * output):
        output = model(input_ids, output_attentions=True)
    return [output.attentions[1], output.logits]


def test_sharpened_attention(qwen3: BothModels, prompts: Tensor) -> None:
    soft, sharp = (qwen3.run(attention_temperature, prompts, factor=factor)[0] for factor in (1.0, 4.0))
    assert sharp.amax(-1).mean() > soft.amax(-1).mean()

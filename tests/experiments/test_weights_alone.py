"""What weights say without a prompt: circuits, directions and neighbours, from parameters that workers hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from both_models import BothModels

pytestmark = pytest.mark.process


@torch.no_grad()
def copying_heads(model: Any) -> Tensor:
    """Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits": eigenvalues of OV circuits, positive if copying."""
    config = model.config
    embedding, unembedding = model.model.embed_tokens.weight, model.lm_head.weight
    scores = []
    for layer in model.model.layers:
        values = layer.self_attn.v_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)
        outputs = layer.self_attn.o_proj.weight.view(-1, config.num_attention_heads, config.head_dim)
        for head in range(config.num_attention_heads):
            value = values[head * config.num_key_value_heads // config.num_attention_heads]
            # the small matrix has the eigenvalues of the one over the vocabulary
            eigenvalues = torch.linalg.eigvals(value @ (embedding.T @ unembedding) @ outputs[:, head])
            scores.append(eigenvalues.real.sum() / eigenvalues.abs().sum())
    return torch.stack(scores).view(-1, config.num_attention_heads)


def test_copying_heads(llama: BothModels) -> None:
    scores = llama.run(copying_heads)
    assert scores.shape == (4, 4)
    assert (scores.abs() <= 1).all()
    assert scores.unique().numel() == 16


@torch.no_grad()
def composition_scores(model: Any) -> Tensor:
    """Elhage et al. (2021): how much each head's queries read of what each earlier head writes (Q-composition)."""
    size, num_heads = model.config.n_embd, model.config.n_head
    read, written = [], []
    for block in model.transformer.h:
        queries, keys, values = (
            each.view(size, num_heads, -1).transpose(0, 1) for each in block.attn.c_attn.weight.split(size, dim=1)
        )
        read.append(queries @ keys.transpose(1, 2))
        written.append(values @ block.attn.c_proj.weight.view(num_heads, -1, size))
    scores = []
    for early in range(len(written)):
        for late in range(early + 1, len(read)):
            product = torch.linalg.matrix_norm(written[early][:, None] @ read[late][None])
            scale = torch.linalg.matrix_norm(written[early])[:, None] * torch.linalg.matrix_norm(read[late])[None]
            scores.append(product / scale)
    return torch.stack(scores)


def test_composition_scores(gpt2: BothModels) -> None:
    scores = gpt2.run(composition_scores)
    assert scores.shape == (6, 4, 4)
    assert ((scores > 0) & (scores < 1)).all()


@torch.no_grad()
def singular_directions(model: Any, layer: int, num_directions: int = 4) -> tuple[Tensor, Tensor]:
    """Millidge & Black (2022), "The Singular Value Decompositions of Transformer Weight Matrices are Highly Interpretable"."""
    down = model.model.layers[layer].mlp.down_proj.weight.float()
    left, values, _ = torch.linalg.svd(down, full_matrices=False)
    logits = left.T[:num_directions] @ model.get_output_embeddings().weight.float().T
    return values, logits.topk(5).indices


def test_singular_directions(gemma2: BothModels, qwen3: BothModels) -> None:
    for models in (gemma2, qwen3):
        values, tokens = models.run(singular_directions, layer=2)
        assert (values.diff() < 0).all()
        assert tokens.unique(dim=0).shape == (4, 5)


@torch.no_grad()
def embedding_neighbours(model: Any, tokens: Tensor, num_neighbours: int = 4) -> Tensor:
    """Mikolov et al. (2013), "Linguistic Regularities": nearest words, and the one that completes an analogy."""
    unit = functional.normalize(model.get_input_embeddings().weight, dim=-1)
    nearest = (unit[tokens] @ unit.T).topk(num_neighbours).indices
    analogy = unit[tokens[0]] - unit[tokens[1]] + unit[tokens[2]]
    return torch.cat([nearest.flatten(), (unit @ analogy).topk(num_neighbours).indices])


def test_embedding_neighbours(bloom: BothModels, prompts: Tensor) -> None:
    neighbours = bloom.run(embedding_neighbours, prompts[0, :3])
    assert torch.equal(neighbours[:12:4], prompts[0, :3])  # each is nearest to itself


@torch.no_grad()
def key_value_memories(
    model: Any, input_ids: Tensor, layer: int, num_neurons: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Geva et al. (2021, 2022), "Transformer Feed-Forward Layers Are Key-Value Memories": which trigger, what they promote."""
    activations: list[Tensor] = []
    mlp = model.transformer.h[layer].mlp
    with mlp.act.register_forward_hook(lambda _m, _args, output: activations.append(output)):
        model(input_ids)
    strength, neurons = activations[0][:, -1].mean(0).topk(num_neurons)
    promoted = model.lm_head(mlp.c_proj.weight[neurons]).topk(6).indices
    triggers = activations[0][..., neurons].flatten(0, 1).topk(3, dim=0).indices
    return strength, promoted, triggers


def test_key_value_memories(gpt2: BothModels, prompts: Tensor) -> None:
    strength, promoted, _ = gpt2.run(key_value_memories, prompts, layer=1)
    assert (strength > 0).all()
    assert promoted.unique(dim=0).shape == (5, 6)


@torch.no_grad()
def expert_similarity(model: Any) -> Tensor:
    """Lo et al. (2024), "A Closer Look into Mixture-of-Experts": how alike experts' weights and their routers' rows are."""
    similarities = []
    for layer in model.model.layers:
        for rows in (layer.mlp.experts.down_proj.flatten(1), layer.mlp.gate.weight):
            unit = functional.normalize(rows, dim=-1)
            similarities.append(unit @ unit.T)
    return torch.stack(similarities)


def test_expert_similarity(mixtral: BothModels) -> None:
    similarity = mixtral.run(expert_similarity)
    assert torch.allclose(similarity.diagonal(0, 1, 2), torch.ones(8, 4))
    assert similarity[:, 0, 1].abs().max() < 0.9

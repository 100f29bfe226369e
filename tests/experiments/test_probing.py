"""What states know: probes trained on them, and measures of how they lie to each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from both_models import BothModels

pytestmark = pytest.mark.process


def linear_probes(model: Any, input_ids: Tensor, labels: Tensor, num_steps: int = 30) -> tuple[Tensor, Tensor]:
    """Alain & Bengio (2016), "Understanding intermediate layers using linear classifier probes": one for each layer."""
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True).hidden_states
    weights, losses = [], []
    for each in states:
        probe = nn.Linear(each.shape[-1], 1)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=0.05)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(probe(each[:, -1])[:, 0], labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        weights.append(probe.weight.detach())
    return torch.stack(weights), torch.stack(losses).view(len(states), num_steps)


def test_linear_probes(llama: BothModels, prompts: Tensor) -> None:
    _, losses = llama.run(linear_probes, prompts, (torch.arange(8) % 2).float())
    assert (losses[:, -1] < losses[:, 0] / 2).all()


def contrast_consistent_search(model: Any, yes: Tensor, no: Tensor, layer: int, num_steps: int = 40) -> Any:
    """Burns et al. (2022), "Discovering Latent Knowledge in Language Models Without Supervision"."""
    with torch.no_grad():
        pair = [model(ids, output_hidden_states=True).hidden_states[layer][:, -1] for ids in (yes, no)]
    first, second = ((states - states.mean(0)) / states.std(0) for states in pair)
    probe = nn.Sequential(nn.Linear(first.shape[-1], 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.02)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        true, false = probe(first), probe(second)
        loss = (true - (1 - false)).square().mean() + torch.minimum(true, false).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, (probe(first) + 1 - probe(second)) / 2


def test_contrast_consistent_search(qwen3: BothModels, prompts: Tensor) -> None:
    yes, no = (torch.cat([prompts, torch.full((8, 1), token)], dim=1) for token in (17, 42))
    losses, _ = qwen3.run(contrast_consistent_search, yes, no, layer=3)
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
def mass_mean_probe(model: Any, true: Tensor, false: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Marks & Tegmark (2023), "The Geometry of Truth": a probe of two means, which is causal: statements are flipped by it."""
    states = [model(ids, output_hidden_states=True).hidden_states[layer + 1][:, -1] for ids in (true, false)]
    direction = states[0].mean(0) - states[1].mean(0)
    centred = torch.cat([each - each.mean(0) for each in states])
    covariance = centred.T @ centred / len(centred) + 0.1 * torch.eye(len(direction))
    probabilities = (torch.cat(states) @ torch.linalg.solve(covariance, direction)).sigmoid()

    def flip(_module: Any, _args: Any, output: Any) -> Any:
        output[0][:, -1] += direction
        return output

    with model.transformer.h[layer].register_forward_hook(flip):
        return probabilities, model(false).logits[:, -1]


def test_mass_mean_probe(bloom: BothModels, prompts: Tensor) -> None:
    _, flipped = bloom.run(mass_mean_probe, prompts[:4], prompts[4:], layer=2)
    assert not torch.equal(flipped, bloom.uncut(prompts[4:]).logits[:, -1])


def structural_probe(
    model: Any, input_ids: Tensor, layer: int, rank: int = 4, num_steps: int = 15
) -> tuple[Tensor, list[float]]:
    """Hewitt & Manning (2019), "A Structural Probe for Finding Syntax": a map under which distances are those of a tree."""
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True).hidden_states[layer]
    positions = torch.arange(states.shape[1])
    tree = (positions[:, None] - positions).abs().float()  # each word hangs from the one before it
    projection = nn.Parameter(0.05 * torch.randn(states.shape[-1], rank))
    optimizer, losses = torch.optim.Adam([projection], lr=0.02), []
    for _ in range(num_steps):
        optimizer.zero_grad()
        projected = states @ projection
        distances = (projected[:, :, None] - projected[:, None]).square().sum(-1)
        loss = (distances - tree).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return projection.detach(), losses


def test_structural_probe(gpt2: BothModels, prompts: Tensor) -> None:
    _, losses = gpt2.run(structural_probe, prompts, layer=2)
    assert losses[-1] < losses[0]


@torch.no_grad()
def centred_kernel_alignment(model: Any, input_ids: Tensor) -> Tensor:
    """Kornblith et al. (2019), "Similarity of Neural Network Representations Revisited": linear CKA of every two layers."""
    states = [each.flatten(0, 1) for each in model(input_ids, output_hidden_states=True).hidden_states]
    centred = [each - each.mean(0) for each in states]
    rows = []
    for one in centred:
        own = torch.linalg.matrix_norm(one.T @ one)
        rows.append(
            torch.stack(
                [
                    torch.linalg.matrix_norm(other.T @ one).square() / (own * torch.linalg.matrix_norm(other.T @ other))
                    for other in centred
                ]
            )
        )
    return torch.stack(rows)


def test_centred_kernel_alignment(mixtral: BothModels, prompts: Tensor) -> None:
    alignment = mixtral.run(centred_kernel_alignment, prompts)
    assert torch.allclose(alignment.diagonal(), torch.ones(5))
    assert (alignment[0, 1:] < 0.99).all()


@torch.no_grad()
def canonical_correlations(model: Any, input_ids: Tensor, num_directions: int = 8) -> Tensor:
    """Raghu et al. (2017), "SVCCA": correlations of the main directions of each layer with those of the next."""
    captured: list[Tensor] = []
    handles = [
        layer.mlp.register_forward_hook(lambda _m, _args, output: captured.append(output.flatten(0, 1)))
        for layer in model.model.layers
    ]
    model(input_ids)
    for handle in handles:
        handle.remove()
    main = [
        torch.linalg.svd((each - each.mean(0)).float(), full_matrices=False).U[:, :num_directions] for each in captured
    ]
    return torch.stack([torch.linalg.svdvals(one.T @ other) for one, other in itertools.pairwise(main)])


def test_canonical_correlations(gemma2: BothModels, prompts: Tensor) -> None:
    correlations = gemma2.run(canonical_correlations, prompts)
    assert correlations.shape == (3, 8)
    assert (correlations[:, -1] < correlations[:, 0]).all()


@torch.no_grad()
def anisotropy(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ethayarajh (2019), "How Contextual are Contextualized Word Representations?": cosines of random words and of the same."""
    word = input_ids[0, 0]
    same = input_ids.clone()
    same[:, -1] = word
    of_random, of_word = [], []
    for ids, cosines in ((input_ids, of_random), (same, of_word)):
        for states in model(ids, output_hidden_states=True).hidden_states:
            unit = functional.normalize(states[:, -1], dim=-1)
            pairs = (unit @ unit.T)[tuple(torch.triu_indices(len(unit), len(unit), offset=1))]
            cosines.append(pairs.mean())
    return torch.stack(of_random), torch.stack(of_word)


def test_anisotropy(llama: BothModels, prompts: Tensor) -> None:
    of_random, of_word = llama.run(anisotropy, prompts)
    assert torch.allclose(of_word[0], torch.ones(()))
    assert (of_word > of_random).all()


@torch.no_grad()
def intrinsic_dimension(model: Any, input_ids: Tensor) -> Tensor:
    """Facco et al. (2017); Valeriani et al. (2023): the TwoNN estimate of each layer's dimension."""
    dimensions = []
    for states in model(input_ids, output_hidden_states=True).hidden_states[1:]:
        points = states[:, 2:].flatten(0, 1)  # the first tokens of a text have nothing to differ by
        distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
        nearest = distances.topk(2, largest=False).values
        ratios = (nearest[:, 1] / nearest[:, 0]).log()
        dimensions.append(len(points) / ratios.sum())
    return torch.stack(dimensions)


def test_intrinsic_dimension(qwen3: BothModels, prompts: Tensor) -> None:
    dimensions = qwen3.run(intrinsic_dimension, prompts)
    assert (dimensions > 1).all()
    assert dimensions.unique().numel() == 4


@torch.no_grad()
def block_influence(model: Any, input_ids: Tensor) -> Tensor:
    """Men et al. (2024), "ShortGPT": how far each layer turns the residual stream."""
    states = model(input_ids, output_hidden_states=True).hidden_states[:-1]  # the last one has been normed
    return torch.stack(
        [1 - functional.cosine_similarity(one, other, dim=-1).mean() for one, other in itertools.pairwise(states)]
    )


def test_block_influence(mixtral: BothModels, llama: BothModels, prompts: Tensor) -> None:
    for models in (mixtral, llama):
        assert (models.run(block_influence, prompts) > 0).all()

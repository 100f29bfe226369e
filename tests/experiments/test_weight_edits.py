"""What a model does with other weights: facts written into it, directions, heads and ranks taken out, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from both_models import BothModels

pytestmark = pytest.mark.process


@contextmanager
def restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Give parameters the values back that they had before a block."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    yield
    with torch.no_grad():
        for parameter, value in kept:
            parameter.copy_(value)


@torch.no_grad()
def rank_one_editing(
    model: Any, texts: Tensor, subject: Tensor, value: Tensor, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Meng et al. (2022), "Locating and Editing Factual Associations in GPT" (ROME): one key of an MLP gets another value."""
    projection = model.transformer.h[layer].mlp.c_proj  # a Conv1D: y = x @ weight + bias
    seen: list[Tensor] = []
    with projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0])):
        model(texts)
        model(subject)
    keys, key = seen[0].flatten(0, 1), seen[1][0, -1]
    covariance = keys.T @ keys / len(keys) + 0.01 * torch.eye(keys.shape[1])
    direction = torch.linalg.solve(covariance, key)
    with restored([projection.weight]):
        before = model(subject).logits[:, -1]
        current = key @ projection.weight + projection.bias
        projection.weight += torch.outer(direction / (direction @ key), value - current)
        written: list[Tensor] = []
        with projection.register_forward_hook(lambda _module, _args, output: written.append(output[0, -1])):
            after = model(subject).logits[:, -1]
    return written[0], before, after


def test_rank_one_editing(gpt2: BothModels, prompts: Tensor) -> None:
    value = torch.linspace(-2, 2, 32)
    written, before, after = gpt2.run(rank_one_editing, prompts[1:], prompts[:1], value, layer=1)
    assert torch.allclose(written, value, atol=1e-4)
    assert not torch.equal(before, after)


@torch.no_grad()
def abliteration(model: Any, harmful: Tensor, harmless: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Arditi et al. (2024), "Refusal in Language Models": all that writes to the residual stream becomes orthogonal to refusal."""
    means = [model(ids, output_hidden_states=True).hidden_states[layer][:, -1].mean(0) for ids in (harmful, harmless)]
    direction = (means[0] - means[1]) / (means[0] - means[1]).norm()
    writers = [module.weight for each in model.model.layers for module in (each.self_attn.o_proj, each.mlp.down_proj)]
    with restored([model.model.embed_tokens.weight, *writers]):
        model.model.embed_tokens.weight.sub_(torch.outer(model.model.embed_tokens.weight @ direction, direction))
        for weight in writers:
            weight.data -= torch.outer(direction, direction @ weight)
        states = model(harmful, output_hidden_states=True).hidden_states[layer]
        tokens = model.generate(harmful, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return states @ direction, tokens


def test_abliteration(llama: BothModels, prompts: Tensor) -> None:
    along, tokens = llama.run(abliteration, prompts[:4], prompts[4:], layer=2)
    assert along.abs().max() < 1e-4
    assert not torch.equal(
        tokens, llama.uncut.generate(prompts[:4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    )


@torch.no_grad()
def layer_selective_rank_reduction(model: Any, input_ids: Tensor, layer: int, keep: int) -> tuple[Tensor, Tensor]:
    """Sharma et al. (2023), "The Truth is in There" (LASER): a matrix keeps its largest singular values only."""
    weight = model.model.layers[layer].mlp.up_proj.weight
    before = model(input_ids, labels=input_ids).loss
    with restored([weight]):
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        weight.copy_((left[:, :keep] * values[:keep]) @ right[:keep])
        return before, model(input_ids, labels=input_ids).loss


def test_rank_reduction(gemma2: BothModels, qwen3: BothModels, prompts: Tensor) -> None:
    for models in (gemma2, qwen3):
        before, after = models.run(layer_selective_rank_reduction, prompts, layer=2, keep=4)
        assert before != after


@torch.no_grad()
def task_arithmetic(model: Any, task_ids: Tensor, scales: list[float]) -> Tensor:
    """Ilharco et al. (2022), "Editing Models with Task Arithmetic": a difference of all weights is added, and subtracted.

    Here a random one takes the place of what fine-tuning would have changed.
    """
    parameters = dict(model.named_parameters())
    vector = {name: 0.02 * torch.randn(parameter.shape) for name, parameter in parameters.items()}
    losses = []
    for scale in scales:
        with restored(parameters.values()):
            for name, parameter in parameters.items():
                parameter.add_(vector[name], alpha=scale)
            losses.append(model(task_ids, labels=task_ids).loss)
    return torch.stack(losses)


def test_task_arithmetic(bloom: BothModels, prompts: Tensor) -> None:
    losses = bloom.run(task_arithmetic, prompts, [1.0, -1.0])
    assert losses[0] != losses[1]


@torch.no_grad()
def magnitude_pruning(model: Any, input_ids: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """Han et al. (2015), "Learning both Weights and Connections": the smallest weights of each matrix are set to zero."""
    matrices = [module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    before = model(input_ids, labels=input_ids).loss
    with restored(matrices):
        for weight in matrices:
            threshold = weight.abs().flatten().kthvalue(int(sparsity * weight.numel())).values
            weight[weight.abs() <= threshold] = 0
        assert all((weight == 0).float().mean() >= sparsity - 0.01 for weight in matrices)
        return before, model(input_ids, labels=input_ids).loss


def test_magnitude_pruning(llama: BothModels, prompts: Tensor) -> None:
    before, after = llama.run(magnitude_pruning, prompts, sparsity=0.5)
    assert before != after


@torch.no_grad()
def pruned_heads(model: Any, input_ids: Tensor, heads: list[tuple[int, int]]) -> Tensor:
    """Voita et al. (2019), "Analyzing Multi-Head Self-Attention": heads are pruned one after the other, in the weights."""
    head_dim, losses = model.config.head_dim, []
    with restored([layer.self_attn.o_proj.weight for layer in model.model.layers]):
        for layer, head in heads:
            model.model.layers[layer].self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
            losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses)


def test_pruned_heads(qwen3: BothModels, prompts: Tensor) -> None:
    losses = qwen3.run(pruned_heads, prompts, [(0, 1), (1, 2), (3, 3)])
    assert losses.unique().numel() == 3


@torch.no_grad()
def loss_landscape(model: Any, input_ids: Tensor, layer: int, steps: list[float]) -> Tensor:
    """Li et al. (2018), "Visualizing the Loss Landscape of Neural Nets": along a random direction, normalised by filters."""
    weight = model.model.layers[layer].mlp.down_proj.weight
    start = weight.detach().clone()
    direction = torch.randn_like(start)
    direction *= start.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)
    losses = []
    with restored([weight]):
        for step in steps:
            weight.data = start + step * direction
            losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses)


def test_loss_landscape(llama: BothModels, prompts: Tensor) -> None:
    losses = llama.run(loss_landscape, prompts, 2, [-0.5, 0.0, 0.5])
    assert losses[1] == llama.uncut(prompts, labels=prompts).loss
    assert losses.unique().numel() == 3


@torch.no_grad()
def round_to_nearest(model: Any, input_ids: Tensor, num_bits: int) -> Tensor:
    """Frantar et al. (2022), "GPTQ", the baseline: each row of each matrix is rounded to so many bits."""
    losses = [model(input_ids, labels=input_ids).loss]
    matrices = [
        parameter for name, parameter in model.named_parameters() if name.endswith(("c_fc.weight", "c_proj.weight"))
    ]
    with restored(matrices):
        for weight in matrices:
            scale = weight.abs().amax(1, keepdim=True) / (2 ** (num_bits - 1) - 1)
            weight.div_(scale).round_().mul_(scale)
        losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses)


def test_round_to_nearest(gpt2: BothModels, prompts: Tensor) -> None:
    exact, four, eight = (*gpt2.run(round_to_nearest, prompts, 4), gpt2.run(round_to_nearest, prompts, 8)[1])
    assert 0 < (eight - exact).abs() < (four - exact).abs()


@torch.no_grad()
def merged_experts(model: Any, input_ids: Tensor, pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Li et al. (2024), "Merge, Then Compress": two experts of each layer get their mean."""
    before = model(input_ids).logits
    experts = [weight for layer in model.model.layers for weight in layer.mlp.experts.parameters()]
    with restored(experts):
        for weight in experts:
            weight[list(pair)] = weight[list(pair)].mean(0)
        return before, model(input_ids).logits


def test_merged_experts(mixtral: BothModels, prompts: Tensor) -> None:
    before, after = mixtral.run(merged_experts, prompts, (0, 2))
    assert not torch.equal(before, after)

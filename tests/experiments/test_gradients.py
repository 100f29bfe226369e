"""What an answer hangs on, by gradients with respect to what enters the model: saliency, paths, prompts that learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from both_models import BothModels

pytestmark = pytest.mark.process


def saliency(model: Any, input_ids: Tensor, target: int) -> Tensor:
    """Simonyan et al. (2013), "Deep Inside Convolutional Networks"; Li et al. (2016): the norm of each token's gradient."""
    embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, -1, target].sum().backward()
    return embeddings.grad.norm(dim=-1)


def test_saliency(llama: BothModels, bloom: BothModels, prompts: Tensor) -> None:
    for models in (llama, bloom):
        assert (models.run(saliency, prompts, target=17) > 0).all()


def gradient_times_input(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Shrikumar et al. (2016), "Not Just a Black Box": each token's share in the most probable next token."""
    embeddings = model.transformer.wte(input_ids).detach().requires_grad_()
    scores = model(inputs_embeds=embeddings).logits[:, -1].log_softmax(-1).max(-1).values
    (gradient,) = torch.autograd.grad(scores.sum(), embeddings)
    return (gradient * embeddings.detach()).sum(-1), scores.detach()


def test_gradient_times_input(gpt2: BothModels, prompts: Tensor) -> None:
    shares, _ = gpt2.run(gradient_times_input, prompts)
    assert (shares.abs() > 0).all()


def integrated_gradients(model: Any, input_ids: Tensor, target: int, num_steps: int = 16) -> tuple[Tensor, Tensor]:
    """Sundararajan et al. (2017), "Axiomatic Attribution for Deep Networks": all steps of the path in one batch."""
    with torch.no_grad():
        end = model.model.embed_tokens(input_ids)
        start = model.model.embed_tokens(torch.zeros_like(input_ids))
    midpoints = (torch.arange(num_steps) + 0.5) / num_steps
    path = (start + midpoints[:, None, None] * (end - start)).requires_grad_()
    (gradients,) = torch.autograd.grad(model(inputs_embeds=path).logits[:, -1, target].sum(), path)
    attribution = ((end - start) * gradients.mean(0)).sum(-1)
    with torch.no_grad():
        change = [model(inputs_embeds=each).logits[0, -1, target] for each in (end, start)]
    return attribution, change[0] - change[1]


def test_integrated_gradients(qwen3: BothModels, prompts: Tensor) -> None:
    attribution, change = qwen3.run(integrated_gradients, prompts[:1], target=17)
    assert (attribution.sum() - change).abs() < 0.3 * attribution.abs().sum()  # completeness, but for the few steps


def smooth_gradients(model: Any, input_ids: Tensor, target: int, num_samples: int = 6, noise: float = 0.1) -> Tensor:
    """Smilkov et al. (2017), "SmoothGrad: removing noise by adding noise"."""
    with torch.no_grad():
        embeddings = model.model.embed_tokens(input_ids)
    total = torch.zeros_like(embeddings)
    for _ in range(num_samples):
        noisy = (embeddings + noise * embeddings.std() * torch.randn_like(embeddings)).requires_grad_()
        model(inputs_embeds=noisy).logits[:, -1, target].sum().backward()
        total += noisy.grad
    return (total / num_samples).norm(dim=-1)


def test_smooth_gradients(mixtral: BothModels, prompts: Tensor) -> None:
    smooth = mixtral.run(smooth_gradients, prompts[:2], target=17)
    assert not torch.equal(smooth, saliency(mixtral.uncut, prompts[:2], target=17))


def prompt_tuning(
    model: Any, input_ids: Tensor, num_virtual: int = 3, num_steps: int = 5
) -> tuple[Tensor, list[float]]:
    """Lester et al. (2021), "The Power of Scale for Parameter-Efficient Prompt Tuning": soft embeddings learn, weights don't."""
    embeddings = model.get_input_embeddings()(input_ids).detach()
    soft = torch.nn.Parameter(model.get_input_embeddings().weight[:num_virtual].detach().clone())
    labels = torch.cat([torch.full((len(input_ids), num_virtual), -100), input_ids], dim=1)
    optimizer, losses = torch.optim.Adam([soft], lr=0.05), []
    for _ in range(num_steps):
        optimizer.zero_grad()
        inputs = torch.cat([soft.expand(len(input_ids), -1, -1), embeddings], dim=1)
        loss = model(inputs_embeds=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return soft.detach(), losses


def test_prompt_tuning(llama: BothModels, gpt2: BothModels, prompts: Tensor) -> None:
    for models in (llama, gpt2):
        _, losses = models.run(prompt_tuning, prompts[:4])
        assert losses[-1] < losses[0]


def greedy_coordinate_gradient(model: Any, prompt: Tensor, suffix: Tensor, target: Tensor, num_steps: int = 2) -> Any:
    """Zou et al. (2023), "Universal and Transferable Adversarial Attacks": gradients of one-hot tokens choose candidates."""
    embed, losses = model.get_input_embeddings(), []
    labels = torch.cat([torch.full_like(prompt, -100), torch.full_like(suffix, -100), target], dim=1)
    for _ in range(num_steps):
        one_hot = functional.one_hot(suffix, embed.num_embeddings).float().requires_grad_()
        soft = one_hot @ embed.weight.detach()
        inputs = torch.cat([embed(prompt).detach(), soft, embed(target).detach()], dim=1)
        model(inputs_embeds=inputs, labels=labels).loss.backward()
        best = (-one_hot.grad).topk(4, dim=-1).indices[0]  # of each position
        candidates = suffix.repeat(best.numel(), 1)
        positions = torch.arange(suffix.shape[1]).repeat_interleave(best.shape[1])
        candidates[torch.arange(len(candidates)), positions] = best.flatten()
        with torch.no_grad():
            batch = torch.cat(
                [prompt.expand(len(candidates), -1), candidates, target.expand(len(candidates), -1)], dim=1
            )
            logits = model(batch).logits[:, -target.shape[1] - 1 : -1]
            loss = functional.cross_entropy(
                logits.transpose(1, 2), target.expand(len(candidates), -1), reduction="none"
            ).mean(1)
        suffix = candidates[loss.argmin()][None]
        losses.append(loss.min())
    return suffix, torch.stack(losses)


def test_greedy_coordinate_gradient(llama: BothModels, prompts: Tensor) -> None:
    suffix, losses = llama.run(greedy_coordinate_gradient, prompts[:1, :4], prompts[1:2, :3], prompts[2:3, :3])
    assert not torch.equal(suffix, prompts[1:2, :3])
    assert losses[1] < losses[0]


def input_jacobian(model: Any, input_ids: Tensor, tokens: list[int]) -> Tensor:
    """Novak et al. (2018), "Sensitivity and Generalization in Neural Networks": singular values of the input's Jacobian."""
    embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits[0, -1]
    rows = [torch.autograd.grad(logits[token], embeddings, retain_graph=True)[0] for token in tokens]
    return torch.linalg.svdvals(torch.stack(rows).flatten(1).float())


def test_input_jacobian(gemma2: BothModels, prompts: Tensor) -> None:
    values = gemma2.run(input_jacobian, prompts[:1], [3, 17, 42])
    assert (values > 0).all()

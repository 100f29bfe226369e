"""What the residual stream would say if the model stopped there: lenses, early exits and contrasts of layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from both_models import BothModels

pytestmark = pytest.mark.process


@torch.no_grad()
def logit_lens(model: Any, input_ids: Tensor) -> Tensor:
    """Nostalgebraist (2020), "interpreting GPT: the logit lens"."""
    states = model(input_ids, output_hidden_states=True).hidden_states
    return torch.stack([model.lm_head(model.transformer.ln_f(state)) for state in states[:-1]])


def test_logit_lens(gpt2: BothModels, bloom: BothModels, prompts: Tensor) -> None:
    for models in (gpt2, bloom):
        lens = models.run(logit_lens, prompts)
        top = lens.argmax(-1)
        assert all((top[layer] != top[layer + 1]).any() for layer in range(3))


def tuned_lens(model: Any, input_ids: Tensor, num_steps: int = 8) -> tuple[list[Tensor], list[float]]:
    """Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens": an affine map per layer."""
    with torch.no_grad():
        output = model(input_ids, output_hidden_states=True)
    final = output.logits.log_softmax(-1)
    unembed = nn.Sequential(copy.deepcopy(model.model.norm), copy.deepcopy(model.lm_head)).requires_grad_(False)
    learned, losses = [], []
    for states in output.hidden_states[:-1]:
        translator = nn.Linear(states.shape[-1], states.shape[-1])
        nn.init.zeros_(translator.weight)
        nn.init.zeros_(translator.bias)
        optimizer = torch.optim.Adam(translator.parameters(), lr=1e-2)
        for _ in range(num_steps):
            optimizer.zero_grad()
            logits = unembed(states + translator(states))
            loss = functional.kl_div(logits.log_softmax(-1), final, reduction="batchmean", log_target=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        learned += [translator.weight.detach(), translator.bias.detach()]
    return learned, losses


def test_tuned_lens(llama: BothModels, prompts: Tensor) -> None:
    _, losses = llama.run(tuned_lens, prompts)
    assert all(losses[layer * 8 + 7] < losses[layer * 8] for layer in range(4))


@torch.no_grad()
def direct_logit_attribution(model: Any, input_ids: Tensor, answer: int, foil: int) -> tuple[Tensor, Tensor]:
    """Wang et al. (2022), "Interpretability in the Wild": what each head writes along a difference of two logits."""
    mixed: list[Tensor] = []  # what the heads of each layer read, before the output projection
    final: list[Tensor] = []
    handles = [
        block.attn.c_proj.register_forward_pre_hook(lambda _module, args: mixed.append(args[0][:, -1]))
        for block in model.transformer.h
    ]
    handles.append(model.transformer.ln_f.register_forward_pre_hook(lambda _module, args: final.append(args[0][:, -1])))
    logits = model(input_ids).logits[:, -1]
    for handle in handles:
        handle.remove()
    direction = (model.lm_head.weight[answer] - model.lm_head.weight[foil]) * model.transformer.ln_f.weight
    scale = final[0].std(-1, unbiased=False, keepdim=True)  # the last norm's, taken as a constant
    num_heads, head_dim = model.config.n_head, model.config.n_embd // model.config.n_head
    attribution = []
    for block, heads in zip(model.transformer.h, mixed, strict=True):
        output_projection = block.attn.c_proj.weight.view(num_heads, head_dim, -1)
        written = torch.einsum("bhd,hde->bhe", heads.view(-1, num_heads, head_dim), output_projection)
        written = written - written.mean(-1, keepdim=True)
        attribution.append((written @ direction) / scale)
    return torch.stack(attribution, 1), logits[:, answer] - logits[:, foil]


def test_direct_logit_attribution(gpt2: BothModels, prompts: Tensor) -> None:
    attribution, _ = gpt2.run(direct_logit_attribution, prompts, answer=17, foil=42)
    assert attribution.shape == (8, 4, 4)
    assert attribution.abs().min() > 0


@torch.no_grad()
def calm_early_exit(
    model: Any, input_ids: Tensor, threshold: float, max_new_tokens: int = 5
) -> tuple[Tensor, list[int]]:
    """Schuster et al. (2022), "Confident Adaptive Language Modeling": each token exits at the first layer that is sure."""
    output = model(input_ids, output_hidden_states=True)
    exits = []
    for _ in range(max_new_tokens):
        states = [*output.hidden_states[1:-1]]
        by_layer = [model.lm_head(model.model.norm(state[:, -1])).softmax(-1) for state in states]
        by_layer.append(output.logits[:, -1].softmax(-1))
        confidence = [probabilities.topk(2).values.diff().abs().item() for probabilities in by_layer]
        exits.append(next((layer for layer, each in enumerate(confidence) if each > threshold), len(by_layer) - 1))
        token = by_layer[exits[-1]].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        output = model(token, past_key_values=output.past_key_values, output_hidden_states=True)
    return input_ids, exits


def test_early_exit(llama: BothModels, prompts: Tensor) -> None:
    text, exits = llama.run(calm_early_exit, prompts[:1], threshold=0.05)
    full, last = llama.run(calm_early_exit, prompts[:1], threshold=2.0)
    assert set(last) == {3}
    assert min(exits) < 3
    assert not torch.equal(text, full)


@torch.no_grad()
def dola(model: Any, input_ids: Tensor, candidates: list[int], max_new_tokens: int = 4) -> tuple[Tensor, list[int]]:
    """Chuang et al. (2023), "DoLa: Decoding by Contrasting Layers": the last layer against the one that differs most."""
    output = model(input_ids, output_hidden_states=True)
    chosen = []
    for _ in range(max_new_tokens):
        mature = output.logits[:, -1].log_softmax(-1)
        premature = {
            layer: model.lm_head(model.model.norm(output.hidden_states[layer][:, -1])).log_softmax(-1)
            for layer in candidates
        }
        divergence = {}
        for layer, early in premature.items():
            mean = ((mature.exp() + early.exp()) / 2).log()
            divergence[layer] = sum(
                functional.kl_div(mean, each, reduction="batchmean", log_target=True) for each in (mature, early)
            )
        chosen.append(max(divergence, key=lambda layer: float(divergence[layer])))
        contrast = mature - premature[chosen[-1]]
        plausible = mature >= mature.max(-1, keepdim=True).values + torch.tensor(0.1).log()
        token = contrast.masked_fill(~plausible, -torch.inf).argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        output = model(token, past_key_values=output.past_key_values, output_hidden_states=True)
    return input_ids, chosen


def test_dola(qwen3: BothModels, prompts: Tensor) -> None:
    contrasted, chosen = qwen3.run(dola, prompts, candidates=[0, 1, 2])
    greedy = qwen3.uncut.generate(prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert set(chosen) <= {0, 1, 2}
    assert not torch.equal(contrasted, greedy)


def future_lens(model: Any, input_ids: Tensor, layer: int, ahead: int) -> tuple[Tensor, Tensor]:
    """Pal et al. (2023), "Future Lens": a linear map from one state to the final state that comes tokens later."""
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True).hidden_states
        early, late = states[layer][:, :-ahead].flatten(0, 1), states[-1][:, ahead:].flatten(0, 1)
        solution = torch.linalg.lstsq(early, late, driver="gelsd").solution  # two runs of the default differ
        predicted = model.lm_head(early @ solution).argmax(-1)
    return solution, predicted


def test_future_lens(llama: BothModels, prompts: Tensor) -> None:
    _, predicted = llama.run(future_lens, prompts, layer=2, ahead=2)
    assert predicted.unique().numel() > 5

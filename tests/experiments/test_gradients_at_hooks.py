"""Gradients with respect to what hooks see and return: attribution patching, masks of heads, vectors that learn."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from both_models import BothModels

pytestmark = pytest.mark.process


def attribution_patching(model: Any, clean: Tensor, corrupted: Tensor, answer: int, foil: int) -> Tensor:
    """Nanda (2023), "Attribution Patching"; Syed et al. (2023): all patches at once, to first order, by one backward pass."""

    def run(input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        kept: list[Tensor] = []

        def keep(_module: Any, _args: Any, output: Tensor) -> None:
            output.retain_grad()
            kept.append(output)

        embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
        with ExitStack() as hooks:
            for layer in model.model.layers:
                hooks.enter_context(layer.register_forward_hook(keep))
            logits = model(inputs_embeds=embeddings).logits[:, -1]
        return kept, (logits[:, answer] - logits[:, foil]).sum()

    with torch.no_grad():
        states = model(clean, output_hidden_states=True).hidden_states[1:]
    kept, difference = run(corrupted)
    difference.backward()
    return torch.stack(
        [((one - other) * other.grad).sum(-1).detach() for one, other in zip(states[:-1], kept[:-1], strict=True)]
    )


def test_attribution_patching(llama: BothModels, prompts: Tensor) -> None:
    clean, corrupted = prompts[:1, :6], prompts[:1, :6].clone()
    corrupted[:, 2] = prompts[1, 2]
    effects = llama.run(attribution_patching, clean, corrupted, answer=17, foil=42)
    assert (effects[..., :2] == 0).all()
    assert (effects[..., 2:] != 0).all()


def head_importance_by_gradients(model: Any, input_ids: Tensor) -> Tensor:
    """Michel et al. (2019), "Are Sixteen Heads Really Better than One?": gradients of masks by which heads are multiplied."""
    num_heads, masks = model.config.n_head, []

    def multiply(mask: Tensor) -> Any:
        return lambda _module, args: ((args[0].unflatten(-1, (num_heads, -1)) * mask[:, None]).flatten(-2),)

    with ExitStack() as hooks:
        for block in model.transformer.h:
            masks.append(torch.ones(num_heads, requires_grad=True))
            hooks.enter_context(block.attn.c_proj.register_forward_pre_hook(multiply(masks[-1])))
        model(input_ids, labels=input_ids).loss.backward()
    return torch.stack([mask.grad.abs() for mask in masks])


def test_head_importance_by_gradients(gpt2: BothModels, prompts: Tensor) -> None:
    assert (gpt2.run(head_importance_by_gradients, prompts) > 0).all()


def learned_steering_vector(model: Any, prompt: Tensor, target: Tensor, layer: int, num_steps: int = 4) -> Any:
    """Subramani et al. (2022), "Extracting Latent Steering Vectors": a vector is trained to bring forth a sentence."""
    vector = nn.Parameter(torch.zeros(model.config.hidden_size))
    text = torch.cat([prompt, target], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), target], dim=1)
    optimizer, losses = torch.optim.Adam([vector], lr=0.3), []
    with model.model.layers[layer].register_forward_hook(lambda _m, _args, output: output + vector):
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = model(text, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            said = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return vector.detach(), losses, said


def test_learned_steering_vector(qwen3: BothModels, prompts: Tensor) -> None:
    _, losses, _ = qwen3.run(learned_steering_vector, prompts[:2], prompts[2:4, :3], layer=1)
    assert losses[-1] < losses[0]


def neuron_integrated_gradients(model: Any, input_ids: Tensor, answer: int, num_steps: int = 5) -> Tensor:
    """Dai et al. (2022), "Knowledge Neurons in Pretrained Transformers": gradients of a layer's neurons from nothing to all."""
    project = model.transformer.h[2].mlp.dense_4h_to_h
    activations: list[Tensor] = []
    with torch.no_grad(), project.register_forward_pre_hook(lambda _m, args: activations.append(args[0])):
        model(input_ids)
    total = torch.zeros_like(activations[0][:, -1])
    for step in range(1, num_steps + 1):
        scaled = (activations[0][:, -1] * step / num_steps).requires_grad_()

        def put(_module: Any, args: Any, scaled: Tensor = scaled) -> Any:
            hidden = torch.cat([args[0][:, :-1], scaled[:, None]], dim=1)
            return hidden, *args[1:]

        with project.register_forward_pre_hook(put):
            probability = model(input_ids).logits[:, -1].softmax(-1)[:, answer].sum()
        total += torch.autograd.grad(probability, scaled)[0]
    return activations[0][:, -1] * total / num_steps


def test_neuron_integrated_gradients(bloom: BothModels, prompts: Tensor) -> None:
    attribution = bloom.run(neuron_integrated_gradients, prompts[:2], answer=17)
    assert attribution.shape == (2, 128)
    assert (attribution != 0).all()


def learned_rotation(model: Any, base: Tensor, source: Tensor, answers: Tensor, layer: int, num_steps: int = 3) -> Any:
    """Geiger et al. (2024), "Finding Alignments": the directions to interchange are found by gradients (DAS)."""
    rotation = nn.utils.parametrizations.orthogonal(nn.Linear(model.config.hidden_size, 4, bias=False))
    with torch.no_grad():
        other = model(source, output_hidden_states=True).hidden_states[layer + 1]
    optimizer, losses = torch.optim.Adam(rotation.parameters(), lr=0.05), []

    def interchange(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output + (rotation(other) - rotation(output)) @ rotation.weight

    with model.model.layers[layer].register_forward_hook(interchange):
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(base).logits[:, -1], answers)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return rotation.weight.detach(), losses


def test_learned_rotation(llama: BothModels, prompts: Tensor) -> None:
    _, losses = llama.run(learned_rotation, prompts[:4], prompts[4:], torch.tensor([17, 42, 3, 5]), layer=1)
    assert losses[-1] < losses[0]


def learned_fact(
    model: Any, input_ids: Tensor, position: int, answer: int, num_steps: int = 4
) -> tuple[Tensor, list[float]]:
    """Meng et al. (2022), "Locating and Editing Factual Associations in GPT": what an MLP should write for a new fact."""
    delta = torch.zeros(model.config.n_embd, requires_grad=True)
    optimizer, losses = torch.optim.Adam([delta], lr=0.5), []
    with torch.no_grad():
        before = model(input_ids).logits[:, 0].log_softmax(-1)

    def write(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, position] += delta
        return output

    with model.transformer.h[1].mlp.register_forward_hook(write):
        for _ in range(num_steps):
            optimizer.zero_grad()
            logits = model(input_ids).logits
            essence = nn.functional.kl_div(logits[:, 0].log_softmax(-1), before, log_target=True, reduction="batchmean")
            loss = -logits[:, -1].log_softmax(-1)[:, answer].mean() + 0.06 * essence + 0.01 * delta.norm() ** 2
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return delta.detach(), losses


def test_learned_fact(gpt2: BothModels, prompts: Tensor) -> None:
    _, losses = gpt2.run(learned_fact, prompts[:2], position=4, answer=17)
    assert losses[-1] < losses[0]


def feature_visualization(model: Any, num_tokens: int, neuron: int, num_steps: int = 4) -> tuple[Tensor, list[float]]:
    """Olah et al. (2017), "Feature Visualization", for text: embeddings that a neuron likes best, and the nearest words."""
    embed = model.get_input_embeddings()
    inputs = nn.Parameter(embed.weight[3 : 3 + num_tokens].detach().clone()[None])
    optimizer, values = torch.optim.Adam([inputs], lr=0.05), []
    for _ in range(num_steps):
        optimizer.zero_grad()
        seen: list[Tensor] = []
        with model.model.layers[2].mlp.gate_proj.register_forward_hook(
            lambda _m, _a, output, kept=seen: kept.append(output)
        ):
            model(inputs_embeds=inputs)
        value = seen[0][0, -1, neuron]
        (-value).backward()
        optimizer.step()
        values.append(value.item())
    return (inputs[0].detach() @ embed.weight.detach().T).argmax(-1), values


def test_feature_visualization(llama: BothModels, prompts: Tensor) -> None:
    _, values = llama.run(feature_visualization, num_tokens=4, neuron=5)
    assert values[-1] > values[0]

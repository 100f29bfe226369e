"""Sparse dictionaries in place of activations: autoencoders and transcoders, trained, spliced in and steered with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from both_models import BothModels

pytestmark = pytest.mark.process


class SparseAutoencoder(nn.Module):
    """Cunningham et al. (2023), "Sparse Autoencoders Find Highly Interpretable Features in Language Models"."""

    def __init__(self, size: int, num_features: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(size, num_features), nn.Linear(num_features, size)

    def encode(self, states: Tensor) -> Tensor:
        return torch.relu(self.encoder(states - self.decoder.bias))

    def decode(self, features: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(features)
        return decoded


def train(inputs: Tensor, targets: Tensor, num_steps: int = 20) -> tuple[SparseAutoencoder, list[float]]:
    coder, losses = SparseAutoencoder(inputs.shape[-1], 64), []
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        features = coder.encode(inputs)
        loss = (coder.decode(features) - targets).square().mean() + 1e-3 * features.abs().sum(-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return coder.requires_grad_(False), losses


def spliced_autoencoder(model: Any, input_ids: Tensor) -> tuple[list[float], Tensor, Tensor]:
    """Bricken et al. (2023), "Towards Monosemanticity": the loss if a reconstruction takes the place of what is read on."""
    layer = model.transformer.h[1]
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True).hidden_states[2]
    coder, losses = train(states.flatten(0, 1), states.flatten(0, 1))
    with torch.no_grad():
        clean = model(input_ids, labels=input_ids).loss
        with layer.register_forward_hook(lambda _m, _args, output: coder.decode(coder.encode(output))):
            spliced = model(input_ids, labels=input_ids).loss
        with layer.register_forward_hook(lambda _m, _args, output: torch.zeros_like(output)):
            zero = model(input_ids, labels=input_ids).loss
    return losses, torch.stack([clean, spliced, zero]), (zero - spliced) / (zero - clean)


def test_spliced_autoencoder(gpt2: BothModels, prompts: Tensor) -> None:
    training, losses, _ = gpt2.run(spliced_autoencoder, prompts)
    assert training[-1] < training[0]
    assert losses.unique().numel() == 3


def feature_steering(model: Any, input_ids: Tensor, feature: int, value: float) -> tuple[Tensor, Tensor]:
    """Templeton et al. (2024), "Scaling Monosemanticity": a feature is clamped, and the error of the coder is kept."""
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True).hidden_states[3]
    coder, _ = train(states.flatten(0, 1), states.flatten(0, 1))
    active: list[Tensor] = []

    def clamp(_module: Any, _args: Any, output: Tensor) -> Tensor:
        features = coder.encode(output)
        error = output - coder.decode(features)
        active.append((features > 0).float().mean())
        features[..., feature] = value
        return coder.decode(features) + error

    with torch.no_grad(), model.model.layers[2].register_forward_hook(clamp):
        tokens = model.generate(input_ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return torch.stack(active), tokens


def test_feature_steering(llama: BothModels, prompts: Tensor) -> None:
    low, high = (llama.run(feature_steering, prompts, 7, value)[1] for value in (0.0, 80.0))
    assert not torch.equal(low, high)


def transcoder(model: Any, input_ids: Tensor) -> tuple[list[float], Tensor, Tensor]:
    """Dunefsky et al. (2024), "Transcoders Find Interpretable LLM Feature Circuits": a sparse one takes the place of an MLP."""
    mlp, calls = model.model.layers[1].mlp, []
    with torch.no_grad(), mlp.register_forward_hook(lambda _m, args, output: calls.append((args[0], output))):
        clean = model(input_ids).logits
    inputs, outputs = (each.flatten(0, 1) for each in calls[0])
    coder, losses = train(inputs, outputs)
    with torch.no_grad(), mlp.register_forward_hook(lambda _m, args, _output: coder.decode(coder.encode(args[0]))):
        replaced = model(input_ids).logits
    features = coder.encode(inputs)
    attribution = features[-1] * (coder.decoder.weight.T @ (model.lm_head.weight[17] - model.lm_head.weight[42]))
    return losses, replaced - clean, attribution


def test_transcoder(qwen3: BothModels, prompts: Tensor) -> None:
    losses, change, attribution = qwen3.run(transcoder, prompts)
    assert losses[-1] < losses[0]
    assert change.abs().max() > 0
    assert attribution.shape == (64,)


@torch.no_grad()
def dictionary_ablation(model: Any, input_ids: Tensor, num_features: int = 6) -> Tensor:
    """Marks et al. (2024), "Sparse Feature Circuits", in its exact form: each feature of a dictionary in turn is ablated."""
    dictionary = torch.linalg.qr(torch.randn(32, 32)).Q.to(torch.bfloat16)
    clean = model(input_ids).logits[:, -1]
    effects = []
    for index in range(num_features):
        direction = dictionary[index]

        def ablate(_module: Any, _args: Any, output: Tensor, direction: Tensor = direction) -> Tensor:
            return output - (output @ direction)[..., None] * direction

        with model.model.layers[1].mlp.register_forward_hook(ablate):
            effects.append(model(input_ids).logits[:, -1] - clean)
    return torch.stack(effects)


def test_dictionary_ablation(gemma2: BothModels, prompts: Tensor) -> None:
    assert gemma2.run(dictionary_ablation, prompts).abs().amax((1, 2)).min() > 0

"""Attributions of captum are those of the uncut model, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import lingualinked as ll
from families import reference, save_tiny
from process.libraries.conftest import Compare, make_compare

attr = pytest.importorskip("captum.attr")
metrics = pytest.importorskip("captum.metrics")

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8]])
TARGET = 7


def of_ids(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids).logits[:, -1].log_softmax(-1)


def of_embeddings(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda embeddings: model(inputs_embeds=embeddings).logits[:, -1].log_softmax(-1)


def embed(model: Any) -> Tensor:
    return model.get_input_embeddings()(IDS).detach()


def mlp_of(model: Any) -> Any:
    return model.model.layers[1].mlp


TOKENS = torch.arange(IDS.shape[1])[None, :, None]  # each token is one feature
PERTURBED: dict[str, Callable[[Any], Any]] = {
    "FeatureAblation": lambda model: attr.FeatureAblation(of_ids(model)).attribute(
        IDS, target=TARGET, baselines=3, perturbations_per_eval=3
    ),
    "FeatureAblation of embeddings": lambda model: attr.FeatureAblation(of_embeddings(model)).attribute(
        embed(model), target=TARGET, feature_mask=TOKENS
    ),
    "FeaturePermutation": lambda model: attr.FeaturePermutation(of_ids(model)).attribute(
        torch.tensor([[1, 17, 93], [5, 6, 7], [9, 8, 7]]), target=TARGET
    ),
    "Occlusion": lambda model: attr.Occlusion(of_ids(model)).attribute(
        IDS, sliding_window_shapes=(2,), target=TARGET, baselines=3
    ),
    "ShapleyValueSampling": lambda model: attr.ShapleyValueSampling(of_ids(model)).attribute(
        IDS, target=TARGET, baselines=3, n_samples=2
    ),
    "ShapleyValues": lambda model: attr.ShapleyValues(of_ids(model)).attribute(IDS[:, :3], target=TARGET, baselines=3),
    "LayerActivation": lambda model: attr.LayerActivation(of_ids(model), mlp_of(model)).attribute(IDS),
    "LayerActivation of inputs": lambda model: attr.LayerActivation(of_ids(model), mlp_of(model)).attribute(
        IDS, attribute_to_layer_input=True
    ),
    "LayerFeatureAblation": lambda model: attr.LayerFeatureAblation(of_ids(model), mlp_of(model)).attribute(
        IDS, target=TARGET, layer_mask=TOKENS
    ),
    "NeuronFeatureAblation": lambda model: attr.NeuronFeatureAblation(of_ids(model), mlp_of(model)).attribute(
        IDS, neuron_selector=(2, 3), baselines=3
    ),
    "infidelity": lambda model: metrics.infidelity(
        of_embeddings(model),
        lambda embeddings: (torch.full_like(embeddings, 0.01), embeddings - 0.01),
        embed(model),
        torch.ones_like(embed(model)),
        target=TARGET,
        n_perturb_samples=2,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("method", PERTURBED)
def test_attributions_by_perturbation(compare: Compare, method: str) -> None:
    def script(model: Any) -> Any:
        torch.manual_seed(0)
        return PERTURBED[method](model)

    compare(script)


@torch.no_grad()
def test_attribution_of_a_text(compare: Compare, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = attr.TextTokenInput("the quick brown fox", tokenizer)

    def script(model: Any) -> Any:
        method = attr.LLMAttribution(attr.FeatureAblation(model), tokenizer)
        given = method.attribute(prompt, target=" dog", use_cached_outputs=False)
        chosen = method.attribute(prompt, gen_args={"max_new_tokens": 2, "do_sample": False}, use_cached_outputs=False)
        return [result for each in (given, chosen) for result in (each.seq_attr, each.token_attr)]

    compare(script)


def test_a_whole_text_after_its_own_kv_cache_is_refused(
    sharded: ll.ShardedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    method = attr.LLMAttribution(attr.FeatureAblation(sharded), tokenizer)
    with torch.no_grad(), pytest.raises(ll.LingualinkedError, match=r"attention_mask of shape .* rows x"):
        method.attribute(attr.TextTokenInput("the quick brown fox", tokenizer), target=" dog", use_cached_outputs=True)


class OfEmbeddings(nn.Module):
    """What methods need that look for activation functions in a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor) -> Tensor:
        return of_embeddings(self.model)(embeddings)


BY_GRADIENTS: dict[str, Callable[[Any], Any]] = {
    "DeepLift": lambda model: attr.DeepLift(OfEmbeddings(model)),
    "GuidedBackprop": lambda model: attr.GuidedBackprop(OfEmbeddings(model)),
    "InputXGradient": lambda model: attr.InputXGradient(of_embeddings(model)),
    "IntegratedGradients": lambda model: attr.IntegratedGradients(of_embeddings(model)),
    "LayerConductance": lambda model: attr.LayerConductance(of_embeddings(model), mlp_of(model)),
    "Saliency": lambda model: attr.Saliency(of_embeddings(model)),
}


@pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks")
@pytest.mark.parametrize("method", BY_GRADIENTS)
def test_attributions_by_gradients_of_the_input(compare: Compare, method: str) -> None:
    def script(model: Any) -> Any:
        options = {"n_steps": 3} if method in ("IntegratedGradients", "LayerConductance") else {}
        return BY_GRADIENTS[method](model).attribute(embed(model).requires_grad_(), target=TARGET, **options)

    compare(script)


def test_attributions_by_gradients_of_layers(compare: Compare) -> None:
    def script(model: Any) -> Any:
        integrated = attr.LayerIntegratedGradients(of_ids(model), model.get_input_embeddings())
        multiplied = attr.LayerGradientXActivation(of_ids(model), mlp_of(model))
        return [
            integrated.attribute(IDS, baselines=torch.zeros_like(IDS), target=TARGET, n_steps=3),
            multiplied.attribute(IDS, target=TARGET),
        ]

    compare(script)


def test_attribution_of_a_text_by_gradients(compare: Compare, tokenizer: PreTrainedTokenizerFast) -> None:
    def script(model: Any) -> Any:
        method = attr.LLMGradientAttribution(
            attr.LayerIntegratedGradients(model, model.get_input_embeddings()), tokenizer
        )
        result = method.attribute(attr.TextTokenInput("the quick brown fox", tokenizer), target=" dog", n_steps=3)
        return result.seq_attr, result.token_attr

    compare(script)


@pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks")
@pytest.mark.parametrize("method", ["DeepLift", "GuidedBackprop"])
def test_rules_of_their_own_for_activation_functions(
    method: str, place: Callable[..., ll.ShardedModel], tmp_path: Path
) -> None:
    folder = save_tiny("opt", torch.float32, tmp_path)
    sharded = place(str(folder), [("a", 0, 2), ("b", 2, 4)])
    make_compare(sharded, reference(folder))(
        lambda model: BY_GRADIENTS[method](model).attribute(embed(model).requires_grad_(), target=TARGET)
    )

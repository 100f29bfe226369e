"""What a model does without a part of it: heads, sublayers, neurons, experts, directions, edges of attention."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from both_models import BothModels

pytestmark = pytest.mark.process


@torch.no_grad()
def zero_ablation(model: Any, input_ids: Tensor) -> Tensor:
    """Olsson et al. (2022) and many others: each attention sublayer in turn writes nothing; change of the loss."""

    def write_nothing(_module: Any, _args: Any, output: Any) -> Any:
        return torch.zeros_like(output[0]), *output[1:]

    losses = [model(input_ids, labels=input_ids).loss]
    for layer in model.model.layers:
        with layer.self_attn.register_forward_hook(write_nothing):
            losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses[1:]) - losses[0]


def test_zero_ablation(llama: BothModels, mixtral: BothModels, prompts: Tensor) -> None:
    for models in (llama, mixtral):
        assert (models.run(zero_ablation, prompts) != 0).all()


@torch.no_grad()
def mean_ablation(model: Any, reference_ids: Tensor, input_ids: Tensor) -> Tensor:
    """Wang et al. (2022), "Interpretability in the Wild": an MLP writes what it writes on average, at each position."""
    changes = []
    clean = model(input_ids).logits[:, -1]
    for block in model.transformer.h:
        written: list[Tensor] = []
        with block.mlp.register_forward_hook(lambda _m, _a, output, kept=written: kept.append(output)):
            model(reference_ids)
        mean = written[0].mean(0)
        with block.mlp.register_forward_hook(lambda _m, _a, output, mean=mean: mean.expand_as(output)):
            changes.append(model(input_ids).logits[:, -1] - clean)
    return torch.stack(changes)


def test_mean_ablation(gpt2: BothModels, prompts: Tensor) -> None:
    changes = gpt2.run(mean_ablation, prompts[:6], prompts[6:])
    assert changes.abs().amax((1, 2)).min() > 0


@torch.no_grad()
def resample_ablation(model: Any, input_ids: Tensor, num_samples: int = 3) -> Tensor:
    """Chan et al. (2022), "Causal Scrubbing": a layer's attention writes what it wrote for another prompt of the batch."""
    clean = model(input_ids).logits[:, -1].log_softmax(-1)
    divergences = []
    for layer in model.model.layers:
        for _ in range(num_samples):
            order = torch.randperm(len(input_ids))
            with layer.self_attn.register_forward_hook(
                lambda _m, _a, output, order=order: (output[0][order], output[1])
            ):
                resampled = model(input_ids).logits[:, -1].log_softmax(-1)
            divergences.append((clean.exp() * (clean - resampled)).sum(-1).mean())
    return torch.stack(divergences).view(-1, num_samples)


def test_resample_ablation(llama: BothModels, prompts: Tensor) -> None:
    assert (llama.run(resample_ablation, prompts) > 0).all()


@torch.no_grad()
def head_importance(model: Any, input_ids: Tensor) -> Tensor:
    """Michel et al. (2019), "Are Sixteen Heads Really Better than One?": the loss without each head, cut out by its slice."""
    head_dim = model.config.n_embd // model.config.n_head
    losses = []
    for block in model.transformer.h:
        for head in range(model.config.n_head):

            def cut_out(_module: Any, args: Any, head: int = head) -> None:
                args[0][..., head * head_dim : (head + 1) * head_dim] = 0  # in place

            with block.attn.c_proj.register_forward_pre_hook(cut_out):
                losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses).view(-1, model.config.n_head) - model(input_ids, labels=input_ids).loss


def test_head_ablation(gpt2: BothModels, prompts: Tensor) -> None:
    importance = gpt2.run(head_importance, prompts)
    assert importance.shape == (4, 4)
    assert (importance != 0).all()


@torch.no_grad()
def knowledge_neurons(model: Any, input_ids: Tensor, num_neurons: int = 5) -> tuple[Tensor, Tensor]:
    """Dai et al. (2022), "Knowledge Neurons": the most active neurons of a layer are suppressed, then amplified."""
    project = model.transformer.h[2].mlp.dense_4h_to_h
    activations: list[Tensor] = []
    with project.register_forward_pre_hook(lambda _module, args: activations.append(args[0][:, -1])):
        clean = model(input_ids).logits[:, -1].softmax(-1)
    neurons = activations[0].mean(0).topk(num_neurons).indices

    def scale(factor: float) -> Any:
        def change(_module: Any, args: Any) -> Any:
            hidden = args[0].clone()
            hidden[..., neurons] *= factor
            return hidden, *args[1:]

        return change

    changes = []
    for factor in (0.0, 2.0):
        with project.register_forward_pre_hook(scale(factor)):
            changes.append(model(input_ids).logits[:, -1].softmax(-1) - clean)
    return neurons, torch.stack(changes)


def test_neuron_ablation(bloom: BothModels, prompts: Tensor) -> None:
    _, changes = bloom.run(knowledge_neurons, prompts)
    assert changes.abs().amax((1, 2)).min() > 0


@torch.no_grad()
def expert_ablation(model: Any, input_ids: Tensor) -> Tensor:
    """Lu et al. (2024), "Not All Experts are Equal": the loss if a router may not choose one of its experts."""
    losses = [model(input_ids, labels=input_ids).loss]
    for layer in model.model.layers:
        for expert in range(model.config.num_local_experts):

            def choose_others(gate: Any, _args: Any, output: Any, expert: int = expert) -> Any:
                logits = output[0].clone()
                logits[:, expert] = -torch.inf
                weights, chosen = logits.softmax(-1).topk(output[2].shape[-1])
                return output[0], weights / weights.sum(-1, keepdim=True), chosen

            with layer.mlp.gate.register_forward_hook(choose_others):
                losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses[1:]).view(-1, model.config.num_local_experts) - losses[0]


def test_expert_ablation(mixtral: BothModels, prompts: Tensor) -> None:
    assert (mixtral.run(expert_ablation, prompts) != 0).all()


@torch.no_grad()
def directional_ablation(model: Any, harmful: Tensor, harmless: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction": nothing may write along it."""
    means = [model(ids, output_hidden_states=True).hidden_states[layer][:, -1].mean(0) for ids in (harmful, harmless)]
    direction = (means[0] - means[1]) / (means[0] - means[1]).norm()

    def remove(states: Tensor) -> Tensor:
        return states - (states @ direction)[..., None] * direction

    with ExitStack() as hooks:
        for each in model.model.layers:
            hooks.enter_context(each.register_forward_pre_hook(lambda _m, args: (remove(args[0]), *args[1:])))
            hooks.enter_context(each.self_attn.register_forward_hook(lambda _m, _a, out: (remove(out[0]), *out[1:])))
            hooks.enter_context(each.mlp.register_forward_hook(lambda _m, _a, out: remove(out)))
        tokens = model.generate(harmful, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return direction, tokens


def test_refusal_direction(qwen3: BothModels, prompts: Tensor) -> None:
    _, tokens = qwen3.run(directional_ablation, prompts[:4], prompts[4:], layer=2)
    assert not torch.equal(
        tokens, qwen3.uncut.generate(prompts[:4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    )


@torch.no_grad()
def attention_knockout(model: Any, input_ids: Tensor, source: int, window: int = 2) -> Tensor:
    """Geva et al. (2023), "Dissecting Recall of Factual Associations": the last token may not attend to the subject."""
    clean = model(input_ids).logits[:, -1].softmax(-1)

    def block(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[:, :, -1, source] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    changes = []
    for first in range(len(model.model.layers) - window + 1):
        with ExitStack() as hooks:
            for layer in model.model.layers[first : first + window]:
                hooks.enter_context(layer.self_attn.register_forward_pre_hook(block, with_kwargs=True))
            changes.append(model(input_ids).logits[:, -1].softmax(-1) / clean - 1)
    return torch.stack(changes)


def test_attention_knockout(qwen3: BothModels, prompts: Tensor) -> None:
    changes = qwen3.run(attention_knockout, prompts, source=3)
    assert len(changes) == 3
    assert changes.abs().amax((1, 2)).min() > 0


@torch.no_grad()
def skipped_layers(model: Any, input_ids: Tensor) -> Tensor:
    """Gromov et al. (2024), "The Unreasonable Ineffectiveness of the Deeper Layers": the loss without each pair of layers."""
    losses = [model(input_ids, labels=input_ids).loss]
    for first in range(3):
        with ExitStack() as hooks:
            for layer in model.model.layers[first : first + 2]:
                hooks.enter_context(layer.register_forward_hook(lambda _m, args, _output: args[0]))
            losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses)


def test_layers_skipped_by_hooks(gemma2: BothModels, prompts: Tensor) -> None:
    losses = gemma2.run(skipped_layers, prompts)
    assert losses.unique().numel() == 4


@torch.no_grad()
def amnesic_probing(model: Any, input_ids: Tensor, labels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Elazar et al. (2021), "Amnesic Probing": a property's directions are projected out, and the model goes on without."""
    states = model(input_ids, output_hidden_states=True).hidden_states[layer][:, -1]
    removed = torch.eye(states.shape[-1])
    for _ in range(3):  # null-space projection; two runs of the default driver differ
        weights = torch.linalg.lstsq(states @ removed, labels[:, None].float(), driver="gelsd").solution
        direction = removed @ weights / (removed @ weights).norm()
        removed = removed - direction @ direction.T
    with model.model.layers[layer].register_forward_pre_hook(lambda _m, args: (args[0] @ removed, *args[1:])):
        return removed, model(input_ids).logits


def test_amnesic_probing(llama: BothModels, prompts: Tensor) -> None:
    labels = torch.arange(8) % 2
    removed, logits = llama.run(amnesic_probing, prompts, labels, layer=2)
    assert torch.linalg.matrix_rank(removed) == 29
    assert not torch.equal(logits, llama.uncut(prompts).logits)


@torch.no_grad()
def ablation_in_beam_search(model: Any, input_ids: Tensor, head: int) -> Tensor:
    """Head ablation while beams are searched: rows of the batch are reordered between the steps that the hook sees."""
    head_dim = model.config.head_dim

    def cut_out(_module: Any, args: Any) -> Any:
        mixed = args[0].clone()
        mixed[..., head * head_dim : (head + 1) * head_dim] = 0
        return (mixed,)

    with model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(cut_out):
        return model.generate(input_ids, max_new_tokens=5, num_beams=3, num_return_sequences=2)


def test_ablation_in_beam_search(gemma2: BothModels, prompts: Tensor) -> None:
    ablated = gemma2.run(ablation_in_beam_search, prompts[:2], head=1)
    assert not torch.equal(ablated, gemma2.run(ablation_in_beam_search, prompts[:2], head=2))

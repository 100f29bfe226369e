"""Experiments that change what modules compute: `intervene` does it on a sharded model as data, hooks do it on the uncut one.

Each has two forms. What `intervene` is given travels once with a text, and no step waits for the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from both_models import BothModels

pytestmark = pytest.mark.process

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@contextmanager
def hooked(model: Any, changes: Mapping[str, Callable[[Tensor], Tensor]], what: str = "output") -> Iterator[None]:
    """Change what modules return, or what they are called with, by hooks."""

    def after(change: Callable[[Tensor], Tensor]) -> Any:
        return lambda _m, _a, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    with ExitStack() as hooks:
        for path, change in changes.items():
            module = model.get_submodule(path)
            if what == "output":
                hooks.enter_context(module.register_forward_hook(after(change)))
            else:
                before = lambda _m, args, change=change: (change(args[0]), *args[1:])  # noqa: E731
                hooks.enter_context(module.register_forward_pre_hook(before))
        yield


@torch.no_grad()
def mean_difference(model: Any, positive: Tensor, negative: Tensor, layer: int) -> Tensor:
    last = [model(ids, output_hidden_states=True).hidden_states[layer + 1][:, -1] for ids in (positive, negative)]
    return (last[0] - last[1]).mean(0)


def steered(model: Any, positive: Tensor, negative: Tensor, input_ids: Tensor, scale: float) -> Tensor:
    """Rimsky et al. (2024), "Steering Llama 2 via Contrastive Activation Addition"."""
    vector = scale * mean_difference(model, positive, negative, 2)
    with model.intervene({"model.layers.2": ll.Add(vector)}):
        return model.generate(input_ids, **GREEDY)


def steered_by_hooks(model: Any, positive: Tensor, negative: Tensor, input_ids: Tensor, scale: float) -> Tensor:
    vector = scale * mean_difference(model, positive, negative, 2)
    with hooked(model, {"model.layers.2": lambda states: states + vector}):
        return model.generate(input_ids, **GREEDY)


def test_contrastive_activation_addition_as_data(gemma2: BothModels, prompts: Tensor) -> None:
    data = (prompts[:3], prompts[3:6], prompts[6:])
    up, down = (gemma2.run_each(steered, steered_by_hooks, *data, scale) for scale in (4.0, -4.0))
    assert not torch.equal(up, down)


@torch.no_grad()
def added_to_the_prompt(model: Any, input_ids: Tensor, love: Tensor, hate: Tensor) -> Tensor:
    """Turner et al. (2023), "Steering Language Models With Activation Engineering": at the first tokens of the prompt."""
    with model.capture("transformer.h.2", what="input") as captured:
        model(love)
        model(hate)
    first, second = captured["transformer.h.2"]
    length = love.shape[1]
    change = ll.Add(5 * (first - second), positions=slice(0, length), steps="prefill", what="input")
    with model.intervene({"transformer.h.2": change}):
        return model.generate(input_ids, **GREEDY)


@torch.no_grad()
def added_by_hooks(model: Any, input_ids: Tensor, love: Tensor, hate: Tensor) -> Tensor:
    first, second = (model(ids, output_hidden_states=True).hidden_states[2] for ids in (love, hate))

    def add(states: Tensor) -> Tensor:
        if states.shape[1] == 1:
            return states
        return torch.cat([states[:, : love.shape[1]] + 5 * (first - second), states[:, love.shape[1] :]], dim=1)

    with hooked(model, {"transformer.h.2": add}, what="input"):
        return model.generate(input_ids, **GREEDY)


def test_activation_addition_as_data(bloom: BothModels, prompts: Tensor) -> None:
    said = bloom.run_each(added_to_the_prompt, added_by_hooks, prompts[:4], prompts[4:5, :4], prompts[5:6, :4])
    assert not torch.equal(said, bloom.uncut.generate(prompts[:4], **GREEDY))


WRITERS = [f"model.layers.{index}{part}" for index in range(4) for part in ("", ".self_attn", ".mlp")]


def without_refusal(model: Any, harmful: Tensor, harmless: Tensor) -> Tensor:
    """Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction"."""
    projection = ll.Project(mean_difference(model, harmful, harmless, 1))
    with model.intervene(dict.fromkeys(WRITERS, projection)):
        return model.generate(harmful, **GREEDY)


def without_refusal_by_hooks(model: Any, harmful: Tensor, harmless: Tensor) -> Tensor:
    basis = ll.Project(mean_difference(model, harmful, harmless, 1)).basis
    with hooked(model, {path: lambda states: states - (states @ basis) @ basis.T for path in WRITERS}):
        return model.generate(harmful, **GREEDY)


def test_refusal_direction_as_data(qwen3: BothModels, prompts: Tensor) -> None:
    said = qwen3.run_each(without_refusal, without_refusal_by_hooks, prompts[:4], prompts[4:])
    assert not torch.equal(said, qwen3.uncut.generate(prompts[:4], **GREEDY))


@torch.no_grad()
def head_importance(model: Any, input_ids: Tensor) -> Tensor:
    """Michel et al. (2019), "Are Sixteen Heads Really Better than One?": masks multiply what output projections read."""
    losses = []
    for layer in range(4):
        for mask in torch.eye(4).logical_not().float():
            change = ll.Scale(mask.repeat_interleave(8), what="input")
            with model.intervene({f"transformer.h.{layer}.attn.c_proj": change}):
                losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses)


@torch.no_grad()
def head_importance_by_hooks(model: Any, input_ids: Tensor) -> Tensor:
    losses = []
    for layer in range(4):
        for mask in torch.eye(4).logical_not().float():
            change = {f"transformer.h.{layer}.attn.c_proj": lambda mixed, mask=mask: mixed * mask.repeat_interleave(8)}
            with hooked(model, change, what="input"):
                losses.append(model(input_ids, labels=input_ids).loss)
    return torch.stack(losses)


def test_head_ablation_as_data(gpt2: BothModels, prompts: Tensor) -> None:
    losses = gpt2.run_each(head_importance, head_importance_by_hooks, prompts)
    assert (losses != gpt2.uncut(prompts, labels=prompts).loss).all()


@torch.no_grad()
def mean_ablation(model: Any, reference_ids: Tensor, input_ids: Tensor) -> list[Tensor]:
    """Wang et al. (2022), "Interpretability in the Wild": means are measured by `capture`, and put in place as data."""
    logits = []
    for layer in range(4):
        path = f"model.layers.{layer}.mlp"
        with model.capture(path) as captured:
            model(reference_ids)
        with model.intervene({path: ll.Ablate(captured[path][0].mean(0))}):
            logits.append(model(input_ids).logits)
    return logits


@torch.no_grad()
def mean_ablation_by_hooks(model: Any, reference_ids: Tensor, input_ids: Tensor) -> list[Tensor]:
    logits = []
    for layer in range(4):
        path, kept = f"model.layers.{layer}.mlp", []
        with model.get_submodule(path).register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out)):
            model(reference_ids)
        mean = kept[0].mean(0)
        with hooked(model, {path: lambda out, mean=mean: mean.expand_as(out)}):
            logits.append(model(input_ids).logits)
    return logits


def test_mean_ablation_as_data(mixtral: BothModels, llama: BothModels, prompts: Tensor) -> None:
    for models in (mixtral, llama):
        logits = models.run_each(mean_ablation, mean_ablation_by_hooks, prompts[:6], prompts[6:])
        assert not any(torch.equal(each, models.uncut(prompts[6:]).logits) for each in logits)


@torch.no_grad()
def patching_heat_map(model: Any, clean: Tensor, corrupted: Tensor, answer: int) -> Tensor:
    """Meng et al. (2022), "Locating and Editing Factual Associations in GPT": each state of a clean run, put in its place."""
    with model.capture("model.layers.*") as captured:
        model(clean)
    logits = []
    for path in captured:
        for position in range(clean.shape[1]):
            value = captured[path][0][:, position : position + 1]
            with model.intervene({path: ll.Replace(value, positions=position)}):
                logits.append(model(corrupted).logits[:, -1, answer])
    return torch.stack(logits)


@torch.no_grad()
def patching_heat_map_by_hooks(model: Any, clean: Tensor, corrupted: Tensor, answer: int) -> Tensor:
    kept: list[Tensor] = []
    with hooked(model, {f"model.layers.{index}": lambda out: kept.append(out) or out for index in range(4)}):
        model(clean)
    logits = []
    for index, states in enumerate(kept):
        for position in range(clean.shape[1]):

            def put(out: Tensor, states: Tensor = states, position: int = position) -> Tensor:
                return torch.cat([out[:, :position], states[:, position : position + 1], out[:, position + 1 :]], dim=1)

            with hooked(model, {f"model.layers.{index}": put}):
                logits.append(model(corrupted).logits[:, -1, answer])
    return torch.stack(logits)


def test_activation_patching_as_data(llama: BothModels, prompts: Tensor) -> None:
    data = (prompts[:1, :5], prompts[1:2, :5], 17)
    effects = llama.run_each(patching_heat_map, patching_heat_map_by_hooks, *data)
    assert effects.unique().numel() > 12


def clamped_feature(model: Any, input_ids: Tensor, direction: Tensor, value: float) -> Tensor:
    """Templeton et al. (2024), "Scaling Monosemanticity": the stream's length along a feature's direction is held at a value."""
    with model.intervene({"model.layers.1": ll.Clamp(value, value, direction)}):
        return model.generate(input_ids, **GREEDY)


def clamped_feature_by_hooks(model: Any, input_ids: Tensor, direction: Tensor, value: float) -> Tensor:
    unit = direction / direction.norm()

    def clamp(states: Tensor) -> Tensor:
        along = states.float() @ unit
        return states + ((along.clamp(value, value) - along)[..., None] * unit).to(states.dtype)

    with hooked(model, {"model.layers.1": clamp}):
        return model.generate(input_ids, **GREEDY)


def test_clamped_feature(gemma2: BothModels, prompts: Tensor) -> None:
    data = (prompts, torch.linspace(-1, 1, 32))
    low, high = (gemma2.run_each(clamped_feature, clamped_feature_by_hooks, *data, value) for value in (0.0, 60.0))
    assert not torch.equal(low, high)


@torch.no_grad()
def causal_tracing(model: Any, input_ids: Tensor, noise: Tensor) -> Tensor:
    """Meng et al. (2022): noise at the subject of all rows but the first, whose states are put into the others."""
    batch = input_ids.repeat(1 + len(noise), 1)
    corrupt = ll.Add(noise, rows=slice(1, None), positions=slice(1, 3))
    with model.capture("transformer.h.*") as clean:
        model(input_ids)
    logits = []
    for path in clean:
        for position in range(input_ids.shape[1]):
            restore = ll.Replace(clean[path][0][:, position], rows=slice(1, None), positions=position)
            with model.intervene({"transformer.wte": corrupt, path: restore}):
                logits.append(model(batch).logits[1:, -1])
    return torch.stack(logits)


@torch.no_grad()
def causal_tracing_by_hooks(model: Any, input_ids: Tensor, noise: Tensor) -> Tensor:
    batch, logits = input_ids.repeat(1 + len(noise), 1), []
    clean: list[Tensor] = []
    with hooked(model, {f"transformer.h.{index}": lambda out: clean.append(out) or out for index in range(4)}):
        model(input_ids)

    def corrupt(embedded: Tensor) -> Tensor:
        embedded[1:, 1:3] += noise
        return embedded

    for index, states in enumerate(clean):
        for position in range(input_ids.shape[1]):

            def restore(out: Tensor, states: Tensor = states, position: int = position) -> Tensor:
                out[1:, position] = states[:, position]
                return out

            with hooked(model, {"transformer.wte": corrupt, f"transformer.h.{index}": restore}):
                logits.append(model(batch).logits[1:, -1])
    return torch.stack(logits)


def test_causal_tracing_as_data(gpt2: BothModels, prompts: Tensor) -> None:
    noise = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(3))
    logits = gpt2.run_each(causal_tracing, causal_tracing_by_hooks, prompts[:1, :5], noise)
    assert logits.flatten(1).unique(dim=0).shape[0] > 12

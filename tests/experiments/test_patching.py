"""Which states carry an answer: what one run had takes its place in another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from both_models import BothModels

pytestmark = pytest.mark.process


def logit_difference(logits: Tensor, answer: int, foil: int) -> Tensor:
    return logits[:, -1, answer] - logits[:, -1, foil]


@torch.no_grad()
def patching_heat_map(model: Any, clean: Tensor, corrupted: Tensor, answer: int, foil: int) -> Tensor:
    """Meng et al. (2022); Wang et al. (2022): how much of the answer each layer's state at each position brings back."""
    output = model(clean, output_hidden_states=True)
    best = logit_difference(output.logits, answer, foil)
    worst = logit_difference(model(corrupted).logits, answer, foil)
    effects = []
    for index, layer in enumerate(model.model.layers):
        for position in range(clean.shape[1]):

            def patch(_module: Any, _args: Any, states: Tensor, index: int = index, position: int = position) -> Tensor:
                states[:, position] = output.hidden_states[index + 1][:, position]
                return states

            with layer.register_forward_hook(patch):
                effects.append((logit_difference(model(corrupted).logits, answer, foil) - worst) / (best - worst))
    return torch.stack(effects).view(len(model.model.layers), clean.shape[1])


def test_activation_patching(llama: BothModels, prompts: Tensor) -> None:
    clean, corrupted = prompts[:1, :6], prompts[:1, :6].clone()
    corrupted[:, 2] = prompts[1, 2]
    effects = llama.run(patching_heat_map, clean, corrupted, answer=17, foil=42)
    assert (effects[:, :2] == 0).all()  # before the token that differs, nothing does
    assert (effects[:3, 2:] != 0).all()


@torch.no_grad()
def path_patching(
    model: Any, clean: Tensor, corrupted: Tensor, sender: tuple[int, int], receiver: tuple[int, int]
) -> Tensor:
    """Goldowsky-Dill et al. (2023), "Localizing Model Behavior with Path Patching": from one head to another's queries."""
    layers, head_dim = model.model.layers, model.config.head_dim

    def slice_of(head: int) -> slice:
        return slice(head * head_dim, (head + 1) * head_dim)

    def mixed_of(input_ids: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        handles = [
            each.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: kept.append(args[0])) for each in layers
        ]
        model(input_ids)
        for handle in handles:
            handle.remove()
        return kept

    # 1) what all heads put out, for both prompts
    mixed, other = mixed_of(clean), mixed_of(corrupted)
    mixed[sender[0]][..., slice_of(sender[1])] = other[sender[0]][..., slice_of(sender[1])]
    # 2) the receiver's queries, if only the sender differs: every other head is frozen
    queries: list[Tensor] = []
    handles = [
        each.self_attn.o_proj.register_forward_pre_hook(lambda _m, _args, value=value: (value,))
        for each, value in zip(layers, mixed, strict=True)
    ]
    reads = layers[receiver[0]].self_attn.q_proj
    handles.append(reads.register_forward_hook(lambda _m, _args, output: queries.append(output)))
    model(clean)
    for handle in handles:
        handle.remove()

    # 3) a run in which the receiver alone reads them
    def read(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output[..., slice_of(receiver[1])] = queries[0][..., slice_of(receiver[1])]
        return output

    with reads.register_forward_hook(read):
        return model(clean).logits[:, -1] - model(corrupted).logits[:, -1]


def test_path_patching(llama: BothModels, prompts: Tensor) -> None:
    by_sender = [
        llama.run(path_patching, prompts[:2], prompts[2:4], sender=(0, head), receiver=(2, 1)) for head in range(2)
    ]
    assert not torch.equal(*by_sender)


@torch.no_grad()
def causal_tracing(model: Any, input_ids: Tensor, subject: slice, noise: float = 3.0, num_rows: int = 4) -> Tensor:
    """Meng et al. (2022), "Locating and Editing Factual Associations in GPT": noise on the subject, one state restored.

    As in their code, the first row of a batch is clean and the others are noisy.
    """
    batch = input_ids.repeat(1 + num_rows, 1)
    answer = model(input_ids).logits[0, -1].argmax()
    spread = model.transformer.wte.weight.std()
    draws = torch.randn(num_rows, subject.stop - subject.start, model.config.n_embd)

    def corrupt(_module: Any, _args: Any, embedded: Tensor) -> Tensor:
        embedded[1:, subject] += noise * spread * draws
        return embedded

    restored = []
    with model.transformer.wte.register_forward_hook(corrupt):
        low = model(batch).logits[1:, -1].softmax(-1).mean(0)[answer]
        for block in model.transformer.h:
            for position in range(input_ids.shape[1]):

                def restore(_module: Any, _args: Any, output: Any, position: int = position) -> Any:
                    states = output[0] if isinstance(output, tuple) else output
                    states[1:, position] = states[:1, position]
                    return output

                with block.register_forward_hook(restore):
                    restored.append(model(batch).logits[1:, -1].softmax(-1).mean(0)[answer] - low)
    return torch.stack(restored).view(len(model.transformer.h), -1)


def test_causal_tracing(gpt2: BothModels, prompts: Tensor) -> None:
    restored = gpt2.run(causal_tracing, prompts[:1, :6], subject=slice(1, 3))
    assert (restored[:, 0] == 0).all()
    assert (restored[:3, 1:] != 0).all()


@torch.no_grad()
def patchscope(model: Any, source: Tensor, target: Tensor, layers: tuple[int, int], position: int) -> Tensor:
    """Ghandeharioun et al. (2024), "Patchscopes": a state of one prompt is read out by the words of another."""
    states = model(source, output_hidden_states=True).hidden_states[layers[0] + 1][:, -1]

    def transplant(_module: Any, _args: Any, output: Any) -> Any:
        if output[0].shape[1] > 1:  # the prompt, not a new token
            output[0][:, position] = states
        return output

    with model.transformer.h[layers[1]].register_forward_hook(transplant):
        return model.generate(target, max_new_tokens=5, min_new_tokens=5, do_sample=False)


def test_patchscopes(bloom: BothModels, prompts: Tensor) -> None:
    said = [bloom.run(patchscope, prompts[:3], prompts[3:6], layers=(1, layer), position=-1) for layer in (0, 2)]
    assert not torch.equal(*said)


@torch.no_grad()
def interchange_intervention(model: Any, base: Tensor, source: Tensor, layer: int, num_dims: int) -> Tensor:
    """Geiger et al. (2024), "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations".

    A few directions of a rotated residual stream take the values that they have for another input.
    """
    rotation = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size)).Q
    states = model(source, output_hidden_states=True).hidden_states[layer + 1]

    def interchange(_module: Any, _args: Any, output: Tensor) -> Tensor:
        rotated, other = output @ rotation, states @ rotation
        rotated[..., :num_dims] = other[..., :num_dims]
        return rotated @ rotation.T

    with model.model.layers[layer].register_forward_hook(interchange):
        return model(base).logits - model(source).logits


def test_interchange_interventions(qwen3: BothModels, prompts: Tensor) -> None:
    few, all_dims = (qwen3.run(interchange_intervention, prompts[:4], prompts[4:], 1, count) for count in (4, 32))
    assert all_dims.abs().max() < 1e-3 < few.abs().max()


@torch.no_grad()
def interpolation(model: Any, start: Tensor, end: Tensor, layer: int, num_steps: int = 5) -> Tensor:
    """Hidden states on the line between two prompts' (the residual counterpart of White 2016, "Sampling Generative Networks")."""
    first, last = (model(ids, output_hidden_states=True).hidden_states[layer + 1] for ids in (start, end))
    logits = []
    for weight in torch.linspace(0, 1, num_steps):
        between = torch.lerp(first, last, weight)
        with model.model.layers[layer].register_forward_hook(lambda _m, _args, _out, between=between: between):
            logits.append(model(start).logits)
    return torch.stack(logits)


def test_interpolated_states(gemma2: BothModels, prompts: Tensor) -> None:
    logits = gemma2.run(interpolation, prompts[:2], prompts[2:4], layer=1)
    assert torch.equal(logits[0], gemma2.uncut(prompts[:2]).logits)
    assert torch.equal(logits[-1], gemma2.uncut(prompts[2:4]).logits)
    assert not torch.equal(logits[1], logits[2])


@torch.no_grad()
def patch_each_row_elsewhere(model: Any, clean: Tensor, corrupted: Tensor, positions: Tensor, layers: Tensor) -> Tensor:
    """All places of a heat map in one batch: each row is patched in a layer and at a position of its own."""
    kept = model(clean, output_hidden_states=True).hidden_states
    rows = torch.arange(len(positions))
    handles = []
    for index, layer in enumerate(model.model.layers):

        def patch(_module: Any, _args: Any, states: Tensor, index: int = index) -> Tensor:
            here = rows[layers == index]
            states[here, positions[here]] = kept[index + 1][0, positions[here]]
            return states

        handles.append(layer.register_forward_hook(patch))
    logits = model(corrupted.expand(len(positions), -1)).logits
    for handle in handles:
        handle.remove()
    return logits[:, -1]


def test_rows_patched_in_places_of_their_own(mixtral: BothModels, prompts: Tensor) -> None:
    positions, layers = torch.tensor([4, 5, 6, 7, 8, 8]), torch.tensor([0, 1, 2, 0, 1, 3])
    logits = mixtral.run(patch_each_row_elsewhere, prompts[:1], prompts[1:2], positions, layers)
    assert logits.unique(dim=0).shape[0] == 6


@torch.no_grad()
def mlp_patching(model: Any, clean: Tensor, corrupted: Tensor, answer: int) -> Tensor:
    """Vig et al. (2020), "Investigating Gender Bias in Language Models": indirect effects of groups of neurons, one by one."""
    kept: list[Tensor] = []
    with model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _m, args: kept.append(args[0])):
        model(clean)
    base = model(corrupted).logits[:, -1].softmax(-1)[:, answer]
    effects = []
    for neurons in torch.arange(kept[0].shape[-1]).split(12):

        def mediate(_module: Any, args: Any, neurons: Tensor = neurons) -> Any:
            return (args[0].index_copy(-1, neurons, kept[0][..., neurons]),)

        with model.model.layers[1].mlp.down_proj.register_forward_pre_hook(mediate):
            effects.append(model(corrupted).logits[:, -1].softmax(-1)[:, answer] / base - 1)
    return torch.stack(effects)


def test_causal_mediation(llama: BothModels, prompts: Tensor) -> None:
    effects = llama.run(mlp_patching, prompts[:2], prompts[2:4], answer=17)
    assert effects.shape == (4, 2)
    assert (effects != 0).all()

"""Experiments that only look: `capture` collects on a sharded model what hooks keep of the uncut one.

Each has two forms. What `capture` chooses or reduces crosses the wire as that, in the step's own messages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from both_models import BothModels

pytestmark = pytest.mark.process


def kept_by_hooks(model: Any, paths: list[str], keep: Any, run: Any) -> dict[str, list[Tensor]]:
    """Return what a function makes of the outputs of modules during a run."""
    kept: dict[str, list[Tensor]] = {path: [] for path in paths}

    def hook_of(path: str) -> Any:
        return lambda _module, _args, output: kept[path].append(
            keep(output[0] if isinstance(output, tuple) else output)
        )

    handles = [model.get_submodule(path).register_forward_hook(hook_of(path)) for path in paths]
    run()
    for handle in handles:
        handle.remove()
    return kept


def train_probe(features: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    probe = nn.Linear(features.shape[-1], 1)
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(probe(features)[:, 0], labels)
        loss.backward()
        optimizer.step()
    return probe.weight.detach(), loss.item()


LAYERS = [f"model.layers.{index}" for index in range(4)]


def probe_on_means(model: Any, input_ids: Tensor, labels: Tensor) -> list[Any]:
    """Alain & Bengio (2016): a probe for each layer, on the mean over a text, which each stage computes."""
    with torch.no_grad(), model.capture("model.layers.*", reduce="mean", dtype=torch.float32) as captured:
        model(input_ids)
    return [train_probe(captured[path][0][:, 0], labels) for path in LAYERS]


def probe_on_means_by_hooks(model: Any, input_ids: Tensor, labels: Tensor) -> list[Any]:
    kept = kept_by_hooks(
        model, LAYERS, lambda states: states.float().mean(1), torch.no_grad()(lambda: model(input_ids))
    )
    return [train_probe(kept[path][0], labels) for path in LAYERS]


def test_probes_on_captured_means(gemma2: BothModels, prompts: Tensor) -> None:
    labels = (torch.arange(8) % 2).float()
    probes = gemma2.run_each(probe_on_means, probe_on_means_by_hooks, prompts, labels)
    assert all(loss < 0.5 for _, loss in probes)


def drift_while_generating(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Chen et al. (2025), "Persona Vectors": a trait is monitored by the projection of each new token's state."""
    with model.capture("model.layers.2", positions=-1) as captured:
        tokens = model.generate(input_ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    states = captured["model.layers.2"].cat()  # rows, steps, hidden
    return tokens, states @ states[:, 0].mean(0)


def drift_by_hooks(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    tokens: list[Tensor] = []
    kept = kept_by_hooks(
        model,
        LAYERS[2:3],
        lambda states: states[:, -1:],
        lambda: tokens.append(model.generate(input_ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)),
    )
    states = torch.cat(kept[LAYERS[2]], dim=1)
    return tokens[0], states @ states[:, 0].mean(0)


def test_drift_while_generating(qwen3: BothModels, prompts: Tensor) -> None:
    _, drift = qwen3.run_each(drift_while_generating, drift_by_hooks, prompts)
    assert drift.shape == (8, 6)
    assert drift.std() > 0


@torch.no_grad()
def writers_of_the_residual_stream(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """Heimersheim & Turner (2023): norms alone cross the wire, of everything that writes to the residual stream."""
    with model.capture(["transformer.h.*.attn", "transformer.h.*.mlp", "transformer.h.*"], reduce="norm") as captured:
        model(input_ids)
    return {path: tensors[0] for path, tensors in captured.items()}


@torch.no_grad()
def writers_by_hooks(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    paths = [
        path
        for path, _ in model.named_modules()
        if path.startswith("transformer.h.") and (path.count(".") == 2 or path.endswith((".attn", ".mlp")))
    ]
    kept = kept_by_hooks(model, paths, lambda states: states.norm(dim=-1), lambda: model(input_ids))
    return {path: tensors[0] for path, tensors in kept.items()}


def test_norms_of_writers(gpt2: BothModels, prompts: Tensor) -> None:
    norms = gpt2.run_each(writers_of_the_residual_stream, writers_by_hooks, prompts)
    assert len(norms) == 12
    assert all(each.shape == (8, 9) and (each > 0).all() for each in norms.values())


def states_to_train_on(model: Any, batches: list[Tensor]) -> Tensor:
    """Bricken et al. (2023): activations for a sparse autoencoder, batch after batch, in the dtype that it trains in."""
    with torch.no_grad(), model.capture("model.layers.1.mlp", dtype=torch.float32) as captured:
        for batch in batches:
            model(batch)
    return train_autoencoder(torch.cat([each.flatten(0, 1) for each in captured["model.layers.1.mlp"]]))


def states_by_hooks(model: Any, batches: list[Tensor]) -> Tensor:
    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    kept = kept_by_hooks(model, ["model.layers.1.mlp"], lambda states: states.float(), run)
    return train_autoencoder(torch.cat([each.flatten(0, 1) for each in kept["model.layers.1.mlp"]]))


def train_autoencoder(states: Tensor) -> Tensor:
    encoder, decoder = nn.Linear(states.shape[-1], 48), nn.Linear(48, states.shape[-1])
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (decoder(encoder(states).relu()) - states).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack([*losses, *encoder.weight.detach().norm(dim=1)])


def test_training_a_sparse_autoencoder(gemma2: BothModels, prompts: Tensor) -> None:
    trained = gemma2.run_each(states_to_train_on, states_by_hooks, list(prompts.split(2)))
    assert trained[9] < trained[0]


@torch.no_grad()
def expert_inputs(model: Any, input_ids: Tensor) -> Tensor:
    """What routers read and decide by themselves: their scores from captured inputs and fetched weights (Jiang et al. 2024)."""
    with model.capture("model.layers.*.mlp", what="input") as captured:
        model(input_ids)
    return torch.stack(
        [
            nn.functional.linear(captured[f"{path}.mlp"][0], model.get_submodule(path).mlp.gate.weight).argmax(-1)
            for path in LAYERS
        ]
    )


@torch.no_grad()
def chosen_experts(model: Any, input_ids: Tensor) -> Tensor:
    scores = model(input_ids, output_router_logits=True).router_logits
    return torch.stack([each.view(*input_ids.shape, -1).argmax(-1) for each in scores])


def test_routers_from_what_they_read(mixtral: BothModels, prompts: Tensor) -> None:
    chosen = mixtral.run_each(expert_inputs, chosen_experts, prompts)
    assert chosen.unique().numel() == 4

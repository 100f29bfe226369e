"""How large activations are, and where: statistics of what modules put out, and what hangs on the extremes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from both_models import BothModels

pytestmark = pytest.mark.process


@torch.no_grad()
def massive_activations(model: Any, input_ids: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sun et al. (2024), "Massive Activations in Large Language Models": the largest few are set to zero, then to their mean."""
    output = model(input_ids, output_hidden_states=True)
    states = output.hidden_states[layer + 1]
    position, feature = divmod(int(states.abs().mean(0).argmax()), states.shape[-1])
    changed = []
    for value in (torch.zeros(()), states[:, position, feature].mean()):

        def put(_module: Any, _args: Any, output: Tensor, value: Tensor = value) -> Tensor:
            output[:, position, feature] = value
            return output

        with model.model.layers[layer].register_forward_hook(put):
            changed.append(model(input_ids).logits - output.logits)
    return states.abs().amax((0, 1)), *changed


def test_massive_activations(llama: BothModels, prompts: Tensor) -> None:
    _, zero, mean = llama.run(massive_activations, prompts, layer=1)
    assert zero.abs().max() > mean.abs().max() > 0


@torch.no_grad()
def outlier_features(model: Any, input_ids: Tensor, threshold: float) -> dict[str, Tensor]:
    """Dettmers et al. (2022), "LLM.int8()": features of the inputs of all linear layers that exceed a threshold somewhere."""
    largest: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":

                def keep(_module: Any, args: Any, name: str = name) -> None:
                    largest[name] = args[0].abs().flatten(0, -2).amax(0)

                hooks.enter_context(module.register_forward_pre_hook(keep))
        model(input_ids)
    return {name: (values > threshold).nonzero() for name, values in largest.items()}


def test_outlier_features(bloom: BothModels, prompts: Tensor) -> None:
    features = bloom.run(outlier_features, prompts, threshold=2.5)
    assert len(features) == 16
    assert 0 < sum(map(len, features.values())) < 700


@torch.no_grad()
def int8_activations(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Dettmers et al. (2022): what absmax quantization of the inputs of every linear layer would cost, by hooks that emulate it."""

    def quantize(_module: Any, args: Any) -> Any:
        scale = args[0].abs().amax(-1, keepdim=True) / 127
        return ((args[0] / scale).round() * scale,)

    exact = model(input_ids, labels=input_ids)
    with ExitStack() as hooks:
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    hooks.enter_context(module.register_forward_pre_hook(quantize))
        rounded = model(input_ids, labels=input_ids)
    return rounded.loss - exact.loss, (rounded.logits - exact.logits).abs().amax()


def test_int8_activations(qwen3: BothModels, prompts: Tensor) -> None:
    loss, largest = qwen3.run(int8_activations, prompts)
    assert loss != 0
    assert 0 < largest < 1


@torch.no_grad()
def smoothing_scales(model: Any, input_ids: Tensor, alpha: float = 0.5) -> list[Tensor]:
    """Xiao et al. (2022), "SmoothQuant": scales between activations and weights, from the maxima of both."""
    scales = []
    for layer in model.model.layers:
        maxima: list[Tensor] = []
        with layer.mlp.gate_proj.register_forward_pre_hook(
            lambda _m, args, kept=maxima: kept.append(args[0].abs().amax((0, 1)))
        ):
            model(input_ids)
        of_weights = torch.maximum(layer.mlp.gate_proj.weight.abs().amax(0), layer.mlp.up_proj.weight.abs().amax(0))
        scales.append(maxima[0].pow(alpha) / of_weights.pow(1 - alpha))
    return scales


def test_smoothing_scales(llama: BothModels, prompts: Tensor) -> None:
    assert all((scale > 0).all() for scale in llama.run(smoothing_scales, prompts))


@torch.no_grad()
def wanda_scores(model: Any, input_ids: Tensor, sparsity: float = 0.5) -> tuple[dict[str, Tensor], Tensor]:
    """Sun et al. (2023), "A Simple and Effective Pruning Approach": weights times norms of inputs; what pruning would do.

    The pruned products take the place of each module's output, so no weight is changed.
    """
    norms: dict[str, Tensor] = {}
    linears = {name: each for name, each in model.model.named_modules() if name.endswith(("gate_proj", "up_proj"))}
    with ExitStack() as hooks:
        for name, module in linears.items():

            def keep(_module: Any, args: Any, name: str = name) -> None:
                norms[name] = args[0].flatten(0, 1).norm(dim=0)

            hooks.enter_context(module.register_forward_pre_hook(keep))
        model(input_ids)
    pruned = {}
    for name, module in linears.items():
        scores = module.weight.abs() * norms[name]
        lowest = scores.argsort(dim=1)[:, : int(sparsity * scores.shape[1])]
        pruned[name] = module.weight.scatter(1, lowest, 0.0)
    with ExitStack() as hooks:
        for name, module in linears.items():
            hooks.enter_context(
                module.register_forward_hook(lambda _m, args, _out, weight=pruned[name]: args[0] @ weight.T)
            )
        return pruned, model(input_ids).logits


def test_wanda_scores(llama: BothModels, prompts: Tensor) -> None:
    pruned, logits = llama.run(wanda_scores, prompts)
    assert all((weight == 0).float().mean() == 0.5 for weight in pruned.values())
    assert not torch.equal(logits, llama.uncut(prompts).logits)


@torch.no_grad()
def residual_norms(model: Any, input_ids: Tensor) -> Tensor:
    """Heimersheim & Turner (2023), "Residual stream norms grow exponentially over the forward pass": of all its writers."""
    norms: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in model.model.layers:
            for module in (layer.self_attn, layer.mlp, layer):
                hooks.enter_context(
                    module.register_forward_hook(
                        lambda _m, _a, out: norms.append(
                            (out[0] if isinstance(out, tuple) else out).norm(dim=-1).mean()
                        )
                    )
                )
        model(input_ids)
    return torch.stack(norms).view(len(model.model.layers), 3)


def test_residual_norms(llama: BothModels, gemma2: BothModels, prompts: Tensor) -> None:
    assert (llama.run(residual_norms, prompts)[:, 2].diff() > 0).all()
    assert (gemma2.run(residual_norms, prompts) > 0).all()


@torch.no_grad()
def neuron_sparsity(model: Any, input_ids: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Li et al. (2022), "The Lazy Neuron Phenomenon": few neurons are active; the others are switched off, in each new token."""
    kept: list[Tensor] = []

    def switch_off(_module: Any, args: Any) -> Any:
        threshold = args[0].abs().quantile(1 - share, dim=-1, keepdim=True)
        kept.append((args[0].abs() >= threshold).float().mean())
        return (args[0].where(args[0].abs() >= threshold, 0.0),)

    with ExitStack() as hooks:
        for block in model.transformer.h:
            hooks.enter_context(block.mlp.c_proj.register_forward_pre_hook(switch_off))
        tokens = model.generate(input_ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return torch.stack(kept), tokens


def test_neuron_sparsity(gpt2: BothModels, prompts: Tensor) -> None:
    kept, tokens = gpt2.run(neuron_sparsity, prompts, share=0.1)
    assert kept.max() < 0.12
    assert not torch.equal(tokens, gpt2.uncut.generate(prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False))


@torch.no_grad()
def router_load(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Jiang et al. (2024), "Mixtral of Experts": how often each expert is chosen, and how often again for the next token."""
    loads, repeats = [], []
    for logits in model(input_ids, output_router_logits=True).router_logits:
        chosen = logits.topk(model.config.num_experts_per_tok).indices.view(*input_ids.shape, -1)
        loads.append(torch.bincount(chosen.flatten(), minlength=model.config.num_local_experts))
        repeats.append((chosen[:, 1:, 0] == chosen[:, :-1, 0]).float().mean())
    return torch.stack(loads), torch.stack(repeats)


def test_router_load(mixtral: BothModels, prompts: Tensor) -> None:
    loads, repeats = mixtral.run(router_load, prompts)
    assert (loads.sum(1) == prompts.numel() * 2).all()
    assert (repeats < 1).all()


class StopForwardError(Exception):
    """Ends a forward pass from a hook, once what is looked for is there."""


@torch.no_grad()
def stopped_trace(model: Any, input_ids: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Meng et al. (2022), its code's ``nethook.Trace(stop=True)``: layers behind the one that is looked at do not run."""
    seen: list[Tensor] = []

    def look(_module: Any, args: Any, output: Tensor) -> None:
        seen.extend([args[0], output])
        raise StopForwardError

    handle = model.get_submodule(name).register_forward_hook(look)
    try:
        model(input_ids)
    except StopForwardError:
        pass
    finally:
        handle.remove()
    return seen[0], seen[1]


def test_stopped_trace(llama: BothModels, prompts: Tensor) -> None:
    args, output = llama.run(stopped_trace, prompts, "model.layers.2.mlp.down_proj")
    assert args.shape == (8, 9, 48)
    assert output.std() > 0

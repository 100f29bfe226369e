"""Counts what a model's layers compute beside what their weights tell: attention, and experts that a token skips.

Works on the meta device, without weights; knows nothing of devices or of how fast they are.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lingualinked.model.parts import NoData, build_meta
from lingualinked.planning.estimate import LayerOperations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from lingualinked.model.parts import ModelParts
    from lingualinked.model.spec import ModelSpec

_NUM_TOKENS = 2  # of a pass; another one has twice as many


def count_operations(spec: ModelSpec, parts: ModelParts, kind_of_layer: Sequence[int]) -> tuple[LayerOperations, ...]:
    """Count the operations of one layer of each kind, from two forward passes without data.

    What grows with the square of the tokens is attention, whatever its heads are called: every new token is multiplied
    with all others in passes without a KV cache.

    Parameters
    ----------
    spec : ModelSpec
        What to build; its weights are not read.
    parts : ModelParts
        As `find_parts` gives them.
    kind_of_layer : sequence of int
        As in `ModelProfile`.

    Returns
    -------
    tuple of LayerOperations
    """
    # Operations are the same in each dtype, and bfloat16 is the one that every kernel knows without data.
    model = build_meta(replace(spec, dtype="bfloat16"))
    layers = model.get_submodule(parts.layers)
    assert isinstance(layers, nn.ModuleList)
    shown = [layers[kind_of_layer.index(kind)] for kind in range(max(kind_of_layer) + 1)]
    short, long = (_count_flops(model, shown, num_tokens) for num_tokens in (_NUM_TOKENS, 2 * _NUM_TOKENS))
    experts_per_token: int = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", 0)
    itemsize: int = getattr(torch, spec.dtype).itemsize
    operations = []
    for layer, few, many in zip(shown, short, long, strict=True):
        stacked = [weight for weight in layer.parameters() if weight.ndim == 3]  # routed experts, one behind the other
        routed = bool(stacked) and experts_per_token > 0
        operations.append(
            LayerOperations(
                # a n + b n^2 and 2 a n + 4 b n^2 were counted: what the second has beyond twice the first is 2 b n^2.
                attention_flops=(many - 2 * few) / (2 * _NUM_TOKENS**2),
                expert_bytes=sum(weight.numel() for weight in stacked) * itemsize if routed else 0,
                expert_share=experts_per_token / stacked[0].shape[0] if routed else 1.0,
            )
        )
    return tuple(operations)


def _count_flops(model: PreTrainedModel, layers: Sequence[nn.Module], num_tokens: int) -> list[int]:
    """Count the floating-point operations of layers in a forward pass of so many tokens."""
    counters = [FlopCounterMode(display=False) for _ in layers]
    with contextlib.ExitStack() as hooks, torch.no_grad(), NoData():
        for layer, counter in zip(layers, counters, strict=True):
            hooks.callback(layer.register_forward_pre_hook(_enter(counter)).remove)
            hooks.callback(layer.register_forward_hook(_leave(counter)).remove)
        model(input_ids=torch.zeros((1, num_tokens), dtype=torch.int64, device="meta"), use_cache=False)
    return [counter.get_total_flops() for counter in counters]


def _enter(counter: FlopCounterMode) -> Callable[..., None]:
    def enter(*_: object) -> None:
        counter.__enter__()

    return enter


def _leave(counter: FlopCounterMode) -> Callable[..., None]:
    def leave(*_: object) -> None:
        counter.__exit__(None, None, None)

    return leave

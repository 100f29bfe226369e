"""Counts the operations of a model's layers that do not follow from their weights: attention, and skipped experts.

Works on the meta device, without weights; knows no devices and no speeds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from lingualinked.model.cutting.parts import build_meta
from lingualinked.model.cutting.trace import NoData
from lingualinked.planning.estimate import LayerOperations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.model.spec import ModelSpec

_NUM_TOKENS = 2  # of the first pass; the second has twice as many


def count_operations(spec: ModelSpec, parts: ModelParts, kind_of_layer: Sequence[int]) -> tuple[LayerOperations, ...]:
    """Count the operations of one layer of each kind, from two forward passes without data.

    Operations that grow with the square of the tokens are attention, whatever its modules are called: without a KV cache,
    every token is multiplied with all others.
    """
    # The number of operations does not depend on the dtype, and all kernels support bfloat16 on the meta device.
    model = build_meta(replace(spec, dtype="bfloat16"))
    examples = [f"{parts.layers}.{kind_of_layer.index(kind)}" for kind in range(max(kind_of_layer) + 1)]
    short, long = (_count_flops(model, examples, num_tokens) for num_tokens in (_NUM_TOKENS, 2 * _NUM_TOKENS))
    experts_per_token: int = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", 0)
    itemsize: int = getattr(torch, spec.dtype).itemsize
    operations = []
    for path, few, many in zip(examples, short, long, strict=True):
        layer = model.get_submodule(path)
        stacked = [weight for weight in layer.parameters() if weight.ndim == 3]  # routed experts, stacked
        routed = bool(stacked) and experts_per_token > 0
        operations.append(
            LayerOperations(
                # The counts are a n + b n^2 and 2 a n + 4 b n^2: the second minus twice the first is 2 b n^2.
                attention_flops=(many - 2 * few) / (2 * _NUM_TOKENS**2),
                expert_bytes=sum(weight.numel() for weight in stacked) * itemsize if routed else 0,
                expert_share=experts_per_token / stacked[0].shape[0] if routed else 1.0,
            )
        )
    return tuple(operations)


def _count_flops(model: PreTrainedModel, paths: Sequence[str], num_tokens: int) -> list[int]:
    """Count the floating-point operations of some modules in a forward pass of `num_tokens` tokens."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), NoData():
        model(input_ids=torch.zeros((1, num_tokens), dtype=torch.int64, device="meta"), use_cache=False)
    counts = counter.get_flop_counts()  # by path and operation; the model's own path is the name of its class
    return [sum(counts[f"{type(model).__name__}.{path}"].values()) for path in paths]

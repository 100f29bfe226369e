"""One forward pass of a stage over the new tokens of several texts.

Knows stages and KV caches; neither sessions nor messages.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingualinked.model.hf_internals import building, computing
from lingualinked.model.layer_skips import NO_SKIPS, LayerSkips
from lingualinked.model.packed.packed_attention import PackedAttention
from lingualinked.model.packed.packed_cache import PackedCache, TextPlace
from lingualinked.model.packed.packed_rotation import rotated_by_text
from lingualinked.model.stage_data import StageInputs, StageOutput
from lingualinked.model.torch_settings import TorchSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lingualinked.model.adapter_data import AdapterUse
    from lingualinked.model.kv_cache import StageCache
    from lingualinked.model.stage import Stage


@dataclass(frozen=True, slots=True)
class TextPart:
    """One text's part in a pass: its KV cache, how many of the tokens are its own, and how many of these have logits."""

    cache: StageCache
    num_new: int
    num_logits: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """The inputs of a pass, as those of a step (`StageInputs`)."""

    states: Tensor  # of all texts in order: token ids [1, tokens] int64, or the previous stage's output
    parts: Sequence[TextPart]
    layout: tuple[bool, ...] | None = None
    torch_settings: TorchSettings = field(default_factory=dict)
    skips: LayerSkips = NO_SKIPS
    adapters: AdapterUse | None = None
    least_rows: int = 2  # no layer sees fewer tokens


def run_pass(stage: Stage, inputs: PassInputs) -> StageOutput:
    """Run a stage over the new tokens of several texts, and count them in the texts' KV caches.

    The output has one row with all tokens in order, or, of the last stage, the logits of those that have some. The KV caches are
    unusable if it raises.
    """
    # 1) find each text's place
    places, positions, kept, start = [], [], [], 0
    for part in inputs.parts:
        stop, past = start + part.num_new, part.cache.num_tokens
        places.append(TextPlace(start, stop, part.cache))
        positions.append(torch.arange(past, past + part.num_new))
        kept.append(torch.arange(stop - min(part.num_logits, part.num_new), stop))
        start = stop
    states, position_ids = inputs.states, torch.cat(positions)
    keep = torch.cat(kept)
    # 2) compute no row alone, or with too few others: its bits would be others than in company
    num_tokens, num_logits = start, len(keep)
    if num_tokens < inputs.least_rows:
        states, position_ids = (
            _repeat_last(each, dim, inputs.least_rows) for each, dim in ((states, 1), (position_ids, 0))
        )
    if 0 < num_logits < inputs.least_rows:
        keep = _repeat_last(keep, 0, inputs.least_rows)
    # 3) run the model's forward pass
    cache = PackedCache(places)
    attention = PackedAttention(places, cache.hf)
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(building.GLOBAL_STATE)
        contexts.enter_context(computing.replaced_attention(attention.wrap_attention, attention.wrap_mask))
        contexts.enter_context(rotated_by_text(stage.span.model, places))
        cache.begin()
        output = stage.step(
            StageInputs(
                tensors=(states,),
                layout=inputs.layout,
                attention_mask=None,
                position_ids=position_ids.unsqueeze(0),
                logits_to_keep=keep,
                torch_settings=inputs.torch_settings,
                skips=inputs.skips,
                adapters=inputs.adapters,
            ),
            cache,  # type: ignore[arg-type]  # has of a cache what a stage uses of it
        )
    # 4) leave out what was repeated
    num_wanted = num_logits if stage.is_last else num_tokens
    output.tensors = tuple(tensor[:, :num_wanted] for tensor in output.tensors)
    return output


def _repeat_last(tensor: Tensor, dim: int, size: int) -> Tensor:
    last = tensor.narrow(dim, tensor.shape[dim] - 1, 1)
    return torch.cat([tensor, *[last] * (size - tensor.shape[dim])], dim)

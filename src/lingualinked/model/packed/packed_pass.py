"""Forward passes of a stage over the new tokens of several texts.

Knows stages and KV caches; neither sessions nor messages.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.exact.rows_alone import rows_alone
from lingualinked.model.hf_internals import building, computing
from lingualinked.model.packed.last_layer import LastLayer
from lingualinked.model.packed.packed_attention import Attend, PackedAttention
from lingualinked.model.packed.packed_cache import PackedCache, PackedStates, TextPlace
from lingualinked.model.packed.packed_rotation import rotated_by_text
from lingualinked.model.packed.qualifying import why_not_packed
from lingualinked.model.process.torch_settings import TorchSettings
from lingualinked.model.stages.layer_skips import NO_SKIPS, LayerSkips
from lingualinked.model.stages.stage_data import StageInputs, StageOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lingualinked.model.adapters.adapter_data import AdapterUse
    from lingualinked.model.kv.kv_cache import StageCache
    from lingualinked.model.stages.stage import Stage


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
    is_alone: bool = False  # each token has the bits that it has alone
    is_invariant: bool = False  # one thread computes attention: with several, where their buffers lie counts


class PackedStage:
    """A stage, for passes over several texts; raises UnsupportedOperationError if its model's class can't run them."""

    def __init__(self, stage: Stage) -> None:
        model = stage.span.model
        why_not = why_not_packed(model, stage.span.parts)
        if why_not:
            raise UnsupportedOperationError(f"packed steps are not possible: {why_not}; use ordinary steps")
        self._stage = stage
        self._ropes = computing.length_ropes(model)
        self._last_layer = None
        if stage.is_last and stage.rounding.independent_rows:  # else fewer rows would have other bits
            layers: Any = model.get_submodule(stage.span.parts.layers)
            self._last_layer = LastLayer(layers[stage.end - 1])

    def run(self, inputs: PassInputs) -> StageOutput:
        """Run the stage over the new tokens of several texts, and count them in the texts' KV caches.

        The output has one row with all tokens in order, or, of the last stage, the logits of those that have some. The KV caches
        are unusable if it raises.
        """
        # 1) find each text's place
        positions: list[int] = []
        kept: list[int] = []  # of which there are logits
        places, start = [], 0
        for part in inputs.parts:
            stop, past = start + part.num_new, part.cache.num_tokens
            places.append(TextPlace(start, stop, part.cache))
            positions += range(past, past + part.num_new)
            kept += range(stop - min(part.num_logits, part.num_new), stop)
            start = stop
        num_tokens, num_logits = start, len(kept)
        # 2) compute no row alone, or with too few others: its bits would be others than in company
        states = inputs.states
        num_ghosts = max(0, inputs.least_rows - num_tokens)
        if num_ghosts:
            states = torch.cat([states, *[states[:, -1:]] * num_ghosts], dim=1)
            positions += positions[-1:] * num_ghosts
        if 0 < num_logits < inputs.least_rows:
            kept += kept[-1:] * (inputs.least_rows - num_logits)
        # 3) run the model's forward pass
        cache = PackedCache(places)
        attention = PackedAttention(places, cache.hf, num_ghosts, with_one_thread=inputs.is_invariant)
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(building.GLOBAL_STATE)
            wrap_attention: Callable[[Attend], Attend] = attention.wrap_attention
            if self._last_layer is not None and not inputs.skips.indices:
                wrap_attention = _join_wraps(attention, self._last_layer, cache.hf)
                contexts.enter_context(self._last_layer.computed_for(kept, len(positions)))
            contexts.enter_context(computing.replaced_attention(wrap_attention, attention.wrap_mask))
            contexts.enter_context(rotated_by_text(self._ropes, places))
            contexts.enter_context(computing.experts_in_pairs())
            if inputs.is_alone:
                contexts.enter_context(rows_alone())
            cache.begin()
            output = self._stage.step(
                StageInputs(
                    tensors=(states,),
                    layout=inputs.layout,
                    attention_mask=None,
                    position_ids=torch.tensor([positions]),
                    logits_to_keep=torch.tensor(kept, dtype=torch.long),
                    torch_settings=inputs.torch_settings,
                    skips=inputs.skips,
                    adapters=inputs.adapters,
                ),
                cache,  # type: ignore[arg-type]  # has of a cache what a stage uses of it
            )
        # 4) leave out what was repeated
        num_wanted = num_logits if self._stage.is_last else num_tokens
        output.tensors = tuple(tensor[:, :num_wanted] for tensor in output.tensors)
        return output


def _join_wraps(attention: PackedAttention, last_layer: LastLayer, states: PackedStates) -> Callable[[Attend], Attend]:
    return lambda attend: last_layer.wrap_attention(attention.wrap_attention(attend), states)

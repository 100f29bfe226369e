"""The KV cache of one session on one stage: growing layers for the stage's own layers, counting ones for the others.

Knows the kinds of layers; no sessions' owners, budgets or other stages.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lingualinked.errors import ArgumentError, ProtocolError, UncuttableModelError
from lingualinked.model.kv_layers import (
    CountingLayer,
    CountingSlidingLayer,
    GrowingLayer,
    GrowingSlidingLayer,
    Growth,
)
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import Tensor
    from transformers import Cache, PreTrainedConfig


OwnedLayer = GrowingLayer | GrowingSlidingLayer


class StageCache:
    """Keys and values of one session in the layers of one stage; `Stage.new_cache` makes it.

    `hf` is what the model's forward gets as ``past_key_values`` (don't call its ``crop``), `owned` the stage's own layers by
    slot, and `num_tokens` counts padding too.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        owned: Collection[int],
        spare_bytes: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.hf: Cache = DynamicCache(config=config)
        self._growth = Growth(2 * len(owned), spare_bytes)
        self.num_tokens = 0
        self.owned: dict[int, OwnedLayer] = {}
        self._elsewhere: list[CountingLayer | CountingSlidingLayer] = []
        for slot, kind in enumerate(self.hf.layers):
            if type(kind) is DynamicLayer:
                window = None
            elif type(kind) is DynamicSlidingWindowLayer:
                window = kind.sliding_window
            else:
                raise UncuttableModelError(
                    config.model_type,
                    f"layer {slot} keeps a state ({kind}) that is neither full nor sliding attention's",
                )
            if slot in owned:
                self.owned[slot] = (
                    GrowingLayer(self._growth) if window is None else GrowingSlidingLayer(window, self._growth)
                )
                self.hf.layers[slot] = self.owned[slot]
            else:
                self._elsewhere.append(CountingLayer() if window is None else CountingSlidingLayer(window))
                self.hf.layers[slot] = self._elsewhere[-1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values of the stage's own layers."""
        return sum(layer.nbytes for layer in self.owned.values())

    @torch.inference_mode()
    def copy(self) -> StageCache:
        """Return an independent copy, for a session that continues from here."""
        growth = copy.copy(self._growth)
        owned = {slot: layer.copy(growth) for slot, layer in self.owned.items()}
        layers = [owned.get(slot) or copy.copy(layer) for slot, layer in enumerate(self.hf.layers)]
        elsewhere = [layer for slot, layer in enumerate(layers) if slot not in owned]
        copied = copy.copy(self)
        vars(copied).update(hf=copy.copy(self.hf), owned=owned, _elsewhere=elsewhere, _growth=growth)
        copied.hf.layers = layers
        return copied

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a finished step for the layers held elsewhere; called by `Stage.step`."""
        for layer in self._elsewhere:
            layer.advance(num_tokens)
        self.num_tokens += num_tokens

    def adopt_layers(self, others: Iterable[StageCache]) -> None:
        """Adopt this stage's layers from caches of the same session in other stages, which become unusable."""
        for other in others:
            for slot in self.owned.keys() & other.owned.keys():
                self.owned[slot] = self.hf.layers[slot] = other.owned[slot]
                self.owned[slot].growth = self._growth

    def complete_adoption(self, num_tokens: int, *, records_past: bool) -> None:
        """Set the number of tokens that the session, and so each layer, adopted or written, has seen."""
        for slot, layer in self.owned.items():
            if layer.stop != num_tokens:
                raise ProtocolError(
                    f"KV of layer slot {slot} ends at token {layer.stop}, and the session has {num_tokens}"
                )
        self.advance(num_tokens - self.num_tokens)
        self.record_past(records_past)

    @property
    def records_past(self) -> bool:
        """Whether sliding layers keep the tokens that leave their window."""
        return any(layer.record_past for layer in self._sliding_layers())

    @property
    def reserved_tokens(self) -> int:
        """Tokens per row that the session is expected to reach; 0: not known."""
        return self._growth.reserved_tokens

    def reserve(self, num_tokens: int) -> None:
        """Expect `num_tokens` tokens per row in total (0: not known); once half are held, allocate exactly this many."""
        self._growth.reserved_tokens = num_tokens

    @torch.inference_mode()
    def reorder(self, rows: Tensor) -> None:
        """Keep the rows with these indices (int64, on any device; repeats allowed), in this order, as beam search does."""
        self.hf.reorder_cache(cast("torch.LongTensor", rows))

    def crop(self, num_tokens: int) -> None:
        """Remove tokens at the end; 0 only drops what was recorded beyond a sliding window.

        Raises ArgumentError if a sliding window is full and has not recorded the tokens that it needs again.
        """
        if num_tokens < 0:
            raise ArgumentError(
                f"can't crop a KV cache by {num_tokens}: pass the number of tokens to remove, at least 0"
            )
        for layer in self._sliding_layers():
            if layer.get_seq_length() >= layer.sliding_window and not layer.record_past:
                raise ArgumentError(
                    f"can't crop a KV cache of {count_text(self.num_tokens, 'token')}: the sliding window "
                    f"({count_text(layer.sliding_window, 'token')}) "
                    "is full and its past was not recorded; activate past recording before the prefill"
                )
        for each in (*self.owned.values(), *self._elsewhere):
            each.drop_last(num_tokens)
        self.num_tokens = max(0, self.num_tokens - num_tokens)

    def record_past(self, on: bool = True) -> None:
        """Keep tokens that leave a sliding window until the next crop, which may need them again."""
        for layer in self._sliding_layers():
            layer.record_past = on

    def _sliding_layers(self) -> list[GrowingSlidingLayer | CountingSlidingLayer]:
        return [
            layer
            for layer in (*self.owned.values(), *self._elsewhere)
            if isinstance(layer, (GrowingSlidingLayer, CountingSlidingLayer))
        ]

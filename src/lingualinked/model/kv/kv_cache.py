"""The KV cache of one session on one stage: layers of the stage's own, and counting ones in place of the others.

Knows the kinds of layers; no sessions' owners, budgets or other stages.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.model.kv.counting_layers import counting_layer
from lingualinked.model.kv.cross_layer import CrossLayer
from lingualinked.model.kv.fixed_layers import (
    CountingFixedLayer,
    CountingFixedSlidingLayer,
    FixedLayer,
    FixedSlidingLayer,
    OwnedFixedLayer,
    TokenCount,
)
from lingualinked.model.kv.growing_tensor import Growth
from lingualinked.model.kv.kept_values import KeptValues
from lingualinked.model.kv.kv_layers import GrowingLayer, GrowingSlidingLayer
from lingualinked.model.kv.own_state import OwnLayerState, OwnState
from lingualinked.model.kv.whole_layers import WholeLayer, whole_layer
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch import Tensor
    from transformers import Cache, PreTrainedConfig


_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)

OwnedLayer = GrowingLayer | GrowingSlidingLayer | WholeLayer | OwnedFixedLayer | CrossLayer


class StageCache:
    """Keys and values of one session in the layers of one stage; `Stage.new_cache` makes it.

    `hf` is what the model's forward gets as ``past_key_values`` (don't call its ``crop``), `owned` the stage's own layers by
    slot, and `num_tokens` counts padding too. `max_cache_len` is the room for tokens per row of a static cache; 0: it grows.
    A model that keeps an object of its own class gets that (`own`), and nothing else is held then.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        owned: Collection[int],
        spare_bytes: Callable[[], float] = lambda: math.inf,
        max_cache_len: int = 0,
        device: torch.device | None = None,
        *,
        own: OwnState | None = None,
    ) -> None:
        self.max_cache_len = max_cache_len
        self.own = own
        self._slots = frozenset(owned)
        self.hf: Cache = DynamicCache(config=config if own is None else None)
        if max_cache_len and own is None:
            self.hf = StaticCache(config=config, max_cache_len=max_cache_len)
        self._is_bounded = not all(self.hf.is_sliding)  # sliding windows alone go on for ever
        self._growth = Growth(2 * len(owned), spare_bytes)
        self.device = device or torch.device("cpu")
        self.count = TokenCount(self.device)  # of a static cache
        self.num_tokens = 0
        self.modules = KeptValues()  # what the stage's modules keep
        self.arriving_lags: Mapping[int, int] = {}  # `lags` of KV that arrives from elsewhere
        self.owned: dict[int, OwnedLayer] = {}
        self._elsewhere: dict[int, Any] = {}
        self.is_plain = own is None and all(type(kind) in _PLAIN for kind in self.hf.layers)
        self._first = min(owned, default=0)
        self._counted: set[int] = set()  # the layers that have counted the step in progress
        for slot, kind in enumerate(self.hf.layers):
            if isinstance(kind, DummyLayer):  # keeps nothing, and is asked for nothing
                continue
            if slot in owned:
                self.hf.layers[slot] = self.owned[slot] = self._make_layer(kind)
            else:
                self.hf.layers[slot] = self._elsewhere[slot] = self._make_counting_layer(kind)
        if config.is_encoder_decoder:
            self._add_cross_layers(owned)

    def _add_cross_layers(self, owned: Collection[int]) -> None:
        """Add a layer of cross-attention for each of the text's, behind them; nothing asks for those held elsewhere."""
        num_layers = len(self.hf.layers)
        for slot in range(num_layers, 2 * num_layers):
            layer = CrossLayer()
            self.hf.layers.append(layer)
            if slot in owned:
                self.owned[slot] = layer

    def _make_layer(self, kind: Any) -> Any:
        if type(kind) is DynamicLayer:
            return GrowingLayer(self._growth)
        if type(kind) is DynamicSlidingWindowLayer:
            return GrowingSlidingLayer(kind.sliding_window, self._growth)
        if type(kind) is StaticLayer:
            return FixedLayer(self.max_cache_len, self.count)
        if type(kind) is StaticSlidingWindowLayer:
            return FixedSlidingLayer(self.max_cache_len, kind.max_cache_len, self.count)
        self._check_grows(kind)
        return whole_layer(kind)

    def _make_counting_layer(self, kind: Any) -> Any:
        if type(kind) is StaticLayer:
            return CountingFixedLayer(self.max_cache_len, self.count)
        if type(kind) is StaticSlidingWindowLayer:
            return CountingFixedSlidingLayer(self.max_cache_len, kind.max_cache_len, self.count)
        self._check_grows(kind)
        return counting_layer(kind)

    def _check_grows(self, kind: Any) -> None:
        if self.is_static:
            raise ArgumentError(
                f"a static KV cache of a model whose layers keep a {kind} is not possible here: leave cache_implementation out"
            )

    @property
    def given(self) -> Any:
        """What the model's forward gets."""
        return self.hf if self.own is None else self.own.value

    @property
    def is_static(self) -> bool:
        """Whether its memory is of a fixed size."""
        return self.max_cache_len > 0

    @property
    def captured(self) -> dict[Any, Any]:
        """What a stage has captured that uses the memory of a static cache; forgotten if that becomes another one."""
        return self.count.captured

    @property
    def num_rows(self) -> int:
        """Number of rows held; 0 before the first step."""
        return max(
            (layer.num_rows for layer in self.owned.values()), default=0 if self.own is None else self.own.num_rows
        )

    @property
    def num_source(self) -> int:
        """Number of source tokens whose KV is held for cross-attention."""
        return max((layer.stop for layer in self.owned.values() if isinstance(layer, CrossLayer)), default=0)

    @property
    def size(self) -> int:
        """Tokens in all rows for which a static cache has memory."""
        return self.num_rows * self.max_cache_len

    @property
    def windows(self) -> dict[int, bool]:
        """The sliding windows of a static cache, and whether each is full: steps then do other things on the device."""
        layers = [each for each in self.hf.layers if isinstance(each, FixedSlidingLayer | CountingFixedSlidingLayer)]
        return {each.max_cache_len: self.num_tokens >= each.max_cache_len for each in layers}

    def window_tensors(self) -> list[Tensor]:
        """Return what the sliding layers of a static cache keep, which a step changes everywhere."""
        layers = [layer for layer in self.owned.values() if isinstance(layer, FixedSlidingLayer)]
        return [each for layer in layers for each in vars(layer).values() if isinstance(each, torch.Tensor)]

    def full_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values, [rows, heads, max_cache_len, dim], of a static cache's layers of full attention."""
        layers = [layer for layer in self.owned.values() if isinstance(layer, FixedLayer)]
        return [layer.read_tokens(0, self.max_cache_len) for layer in layers]

    def new_tokens(self) -> list[Tensor]:
        """Return views of the keys and values that the step in progress has written to these, of one token."""
        return [each.narrow(2, self.num_tokens, 1) for layer in self.full_layers() for each in layer]

    def forget_step(self) -> None:
        """Count the tokens of the step in progress as not seen yet, so that it can be repeated; KV stays as it is."""
        self.count.on_device.fill_(self.num_tokens)
        self.advance(0)

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget the tokens of a static cache, and keep its memory, for another session."""
        for layer in self.owned.values():
            assert isinstance(layer, OwnedFixedLayer)
            layer.clear()
        for kind in [kind for kind, graph in self.captured.items() if graph is None]:
            del self.captured[kind]  # for which memory was short
        self.modules.clear()
        self.num_tokens = 0
        self.count.on_device.zero_()
        self.advance(0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values of the stage's own layers, and for what its modules keep."""
        kept = [*self.owned.values(), self.modules, *([] if self.own is None else [self.own])]
        return sum(each.nbytes for each in kept)

    @torch.inference_mode()
    def copy(self, num_dropped: int = 0) -> StageCache:
        """Return an independent copy, for a session that continues from here, or from before the last `num_dropped` tokens.

        Raises ArgumentError if these can't be removed (`crop`).
        """
        if num_dropped:
            self._check_crop(num_dropped)
        growth, count = copy.copy(self._growth), self.count.copy()
        owned = {slot: _copy_layer(layer, growth, count, num_dropped) for slot, layer in self.owned.items()}
        elsewhere = {slot: copy.copy(layer) for slot, layer in self._elsewhere.items()}
        copied = copy.copy(self)
        copied.modules = self.modules.copy()
        copied.own = None if self.own is None else self.own.copy()
        vars(copied).update(hf=copy.copy(self.hf), owned=owned, _elsewhere=elsewhere, _growth=growth, count=count)
        layers: list[Any] = [
            owned.get(slot) or elsewhere.get(slot) or layer for slot, layer in enumerate(self.hf.layers)
        ]
        copied.hf.layers = layers
        for layer in elsewhere.values():
            if self.is_static:
                layer.count = count
            if num_dropped:
                layer.drop_last(num_dropped)
        copied.num_tokens -= num_dropped
        return copied

    def check_room(self, num_tokens: int) -> None:
        """Raise ArgumentError if a static cache has no room for so many tokens more."""
        if self.is_static and self._is_bounded and self.num_tokens + num_tokens > self.max_cache_len:
            raise ArgumentError(
                f"a static KV cache with room for {count_text(self.max_cache_len, 'token')} holds {self.num_tokens:,}, and "
                f"{num_tokens:,} more were to be added: make it with a larger max_cache_len"
            )

    def enter_span(self, num_tokens: int, skipped: Collection[int] = ()) -> None:
        """Count the tokens of a step in the layers before the stage's own, which may ask for those lengths; called by `Stage`."""
        if not self.is_static:
            self._count_elsewhere([slot for slot in self._elsewhere if slot < self._first], num_tokens, skipped)

    def advance(self, num_tokens: int, skipped: Collection[int] = ()) -> None:
        """Count the tokens of a finished step, in which the layers with some slots were skipped; called by `Stage.step`."""
        self.num_tokens += num_tokens
        if self.is_static:
            self.count.on_host = self.num_tokens
            for layer in (*self.owned.values(), *self._elsewhere.values()):
                layer.record_seen()
            return
        self._count_elsewhere(self._elsewhere, num_tokens, skipped)
        self._counted.clear()
        for slot, layer in self.owned.items():
            if isinstance(layer, WholeLayer) and slot not in skipped:
                layer.record_step(num_tokens)

    def _count_elsewhere(self, slots: Iterable[int], num_tokens: int, skipped: Collection[int]) -> None:
        for slot in slots:
            if slot not in self._counted and slot not in skipped:
                self._elsewhere[slot].advance(num_tokens)
                self._counted.add(slot)

    @property
    def lags(self) -> dict[int, int]:
        """By how many tokens layers of a growing cache are behind, since they were skipped, by slot; own layers and others."""
        if self.is_static:
            return {}
        held = {slot: layer.stop for slot, layer in self.owned.items() if not isinstance(layer, CrossLayer)}
        held |= {slot: layer.cumulative_length for slot, layer in self._elsewhere.items()}
        return {slot: self.num_tokens - length for slot, length in held.items() if length < self.num_tokens}

    def states(self, slots: Iterable[int]) -> list[tuple[int, WholeLayer | OwnLayerState]]:
        """Return what layers with these slots keep beside full and sliding attention's KV, which moves as a whole."""
        if self.own is not None:
            return [(slot, self.own.layer(slot)) for slot in sorted(self._slots.intersection(slots))]
        layers = ((slot, self.owned.get(slot)) for slot in sorted(slots))
        return [(slot, layer) for slot, layer in layers if isinstance(layer, WholeLayer)]

    def adopt_layers(self, others: Iterable[StageCache]) -> None:
        """Adopt this stage's layers from caches of the same session in other stages, which become unusable."""
        for other in others:
            if self.own is not None and other.own is not None and other.own.value is not None:
                for slot in self._slots & other._slots:  # noqa: SLF001 - of the same class
                    self.own.layer(slot).write_state(other.own.layer(slot).read_state(), self.device)
            other.captured.clear()
            self.modules.adopt(other.modules)
            for slot in self.owned.keys() & other.owned.keys():
                layer: Any = other.owned[slot]
                self.owned[slot] = self.hf.layers[slot] = layer
                if isinstance(layer, OwnedFixedLayer):
                    layer.count = self.count
                elif not isinstance(layer, WholeLayer | CrossLayer):
                    layer.growth = self._growth

    def complete_adoption(self, num_tokens: int, *, records_past: bool, lags: Mapping[int, int]) -> None:
        """Set the number of tokens that the session, and so each layer, adopted or written, has seen, except for `lags`."""
        for slot, layer in self.owned.items():
            if not isinstance(layer, CrossLayer) and layer.stop != num_tokens - lags.get(slot, 0):
                raise ProtocolError(
                    f"KV of layer slot {slot} ends at token {layer.stop}, and the session has {num_tokens}"
                )
        self.count.on_device.fill_(num_tokens)
        num_new = num_tokens - self.num_tokens
        self.advance(num_new, self.owned)  # which have seen them
        for slot in lags.keys() & self._elsewhere.keys():
            self._elsewhere[slot].drop_last(lags[slot])
        self.record_past(records_past)

    @property
    def records_past(self) -> bool:
        """Whether layers keep the past that they need no more, such as the tokens that leave a sliding window."""
        return any(layer.record_past for layer in self._forgetting_layers())

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
        if self.own is not None:
            self.own.check_order(rows)
        self.hf.reorder_cache(cast("torch.LongTensor", rows))

    @torch.inference_mode()
    def append_rows(self, others: Sequence[StageCache]) -> None:
        """Append the rows of other sessions of as many tokens, whose caches become unusable; raise ProtocolError for others."""
        if self.own is not None:
            self.own.check_order(torch.zeros(0))
        for other in others:
            if (other.num_tokens, other.max_cache_len, other.lags) != (self.num_tokens, self.max_cache_len, self.lags):
                raise ProtocolError(
                    f"KV of {count_text(other.num_tokens, 'token')} can't be joined with KV of {self.num_tokens}: both "
                    "must have come through the same steps"
                )
        for slot, layer in self.owned.items():
            layer.append_rows([cast("Any", other.owned.pop(slot)) for other in others])

    def crop(self, num_tokens: int) -> None:
        """Remove tokens at the end; 0 only drops what was recorded of the past.

        Raises ArgumentError if a layer needs a past again that it has not recorded, or has a recurrent state.
        """
        if num_tokens < 0:
            raise ArgumentError(
                f"can't crop a KV cache by {num_tokens}: pass the number of tokens to remove, at least 0"
            )
        self._check_crop(num_tokens)
        for each in (*self.owned.values(), *self._elsewhere.values()):
            each.drop_last(num_tokens)
        self.num_tokens = max(0, self.num_tokens - num_tokens)

    def _check_crop(self, num_tokens: int) -> None:
        if self.is_static:
            raise ArgumentError("can't crop a static KV cache, as in transformers: use one that grows")
        if self.own is not None:
            self.own.check_crop()
        for layer in self._forgetting_layers():
            if layer.record_past or not self.num_tokens:
                continue
            window = getattr(layer, "sliding_window", None)
            if window is None:
                cause = f"a layer ({layer!r}) forgets the past, which was not recorded"
            elif layer.get_seq_length() >= window:
                cause = f"the sliding window ({count_text(window, 'token')}) is full and its past was not recorded"
            else:
                continue
            raise ArgumentError(
                f"can't crop a KV cache of {count_text(self.num_tokens, 'token')}: {cause}; activate past recording before "
                "the prefill"
            )
        for layer in self.owned.values():
            if isinstance(layer, WholeLayer):
                layer.check_crop(num_tokens)

    def record_past(self, on: bool = True) -> None:
        """Keep what layers forget, such as tokens that leave a sliding window, until the next crop, which may need it again."""
        for layer in self._forgetting_layers():
            layer.record_past = on

    def _forgetting_layers(self) -> list[Any]:
        layers: list[Any] = [*self.owned.values(), *self._elsewhere.values()]
        return [layer for layer in layers if hasattr(layer, "record_past")]


def _copy_layer(layer: OwnedLayer, growth: Growth, count: TokenCount, num_dropped: int) -> OwnedLayer:
    if isinstance(layer, OwnedFixedLayer):
        return layer.copy(count)
    return layer.copy(num_dropped) if isinstance(layer, WholeLayer) else layer.copy(growth, num_dropped)

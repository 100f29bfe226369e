"""KV layers of a fixed size, as in transformers' StaticCache: a stage's own, and counting ones in place of layers held elsewhere.

Their tensors stay where they are, so that CUDA graphs can use them. Knows no stages and no sessions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.hf_internals.cache_layers import StaticCacheLayer, StaticSlidingCacheLayer


class TokenCount:
    """The tokens that the layers of one cache have seen, on the host and on the device, where graphs advance it."""

    def __init__(self, device: torch.device) -> None:
        self.on_host = 0
        self.on_device = torch.zeros((), dtype=torch.long, device=device)
        self.new_positions = self.on_device.view(1)[:0]  # int64 [new tokens], of the step in progress
        self.visible: int | None = None  # tokens that full attention reads, if not all for which there is memory
        self.captured: dict[Any, Any] = {}  # what a stage has captured that uses the memory of the layers, by kind

    def begin_step(self, num_new: int) -> None:
        """Compute the positions of new tokens, on the device."""
        self.new_positions = torch.arange(num_new, device=self.on_device.device) + self.on_device

    def end_step(self) -> None:
        """Count the new tokens, on the device."""
        self.on_device.add_(len(self.new_positions))

    def copy(self) -> TokenCount:
        """Return a count of its own, for a session that continues from here."""
        copied = TokenCount(self.on_device.device)
        copied.on_host = self.on_host
        copied.on_device.copy_(self.on_device)
        return copied


class _Fixed:
    """Base of a stage's own layers: all memory is allocated with the first tokens."""

    count: TokenCount  # of the cache; changes when another stage adopts the layer
    max_cache_len: int
    is_initialized: bool
    keys: Tensor | None
    values: Tensor | None

    if TYPE_CHECKING:

        @property
        def first(self) -> int: ...

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for as many rows as the first states [rows, heads, tokens, dim] have, or use what fits again."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._zeros(self.keys, key_states), self._zeros(self.values, value_states)
        self.is_initialized = True

    def _zeros(self, held: Tensor | None, states: Tensor) -> Tensor:
        shape = (*states.shape[:2], self.max_cache_len, states.shape[3])
        if held is not None and (held.shape, held.dtype, held.device) == (shape, states.dtype, states.device):
            return held.zero_()
        self.count.captured.clear()
        return states.new_zeros(shape)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(each.nbytes for each in (self.keys, self.values) if each is not None)

    @property
    def num_rows(self) -> int:
        """Number of rows held."""
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens per row that are allocated."""
        return self.max_cache_len

    def read_tokens(self, position: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of tokens from a position on, [rows, heads, tokens, dim]; valid until the next change."""
        assert self.keys is not None
        assert self.values is not None
        offset = position - self.first
        return self.keys.narrow(2, offset, num_tokens), self.values.narrow(2, offset, num_tokens)

    def clear(self) -> None:
        """Forget all tokens, and keep the memory for first states of the same shape."""
        self.is_initialized = False

    def copy(self, count: TokenCount) -> Self:
        """Return an independent layer that holds copies of the same tokens."""
        copied = copy.copy(self)
        state = {name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)}
        vars(copied).update(state, count=count)
        return copied

    def append_rows(self, others: Sequence[Self]) -> None:
        """Append the rows of layers that hold the same tokens of other rows."""
        for name in ("keys", "values"):
            held = [getattr(each, name) for each in (self, *others)]
            setattr(self, name, None if held[0] is None else torch.cat(held))
        self.count.captured.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows with the indices `beam_idx`, in this order; of as many rows, in place."""
        if self.keys is None or self.values is None:
            return
        rows = beam_idx.to(self.keys.device)
        keys, values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        if len(rows) == len(self.keys):
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
            self.count.captured.clear()


class _FullAttention(StaticCacheLayer):
    """Base of the layers of full attention, owned or not."""

    def __init__(self, max_cache_len: int, count: TokenCount) -> None:
        super().__init__(max_cache_len)
        self.count = count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - the memory is of one size
        """Return how many tokens a mask is for, and the first one's position."""
        return self.count.visible or self.max_cache_len, 0


class FixedLayer(_Fixed, _FullAttention):
    """Full attention."""

    def __init__(self, max_cache_len: int, count: TokenCount) -> None:
        super().__init__(max_cache_len, count)
        self._stop = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, new tokens, dim] to keys and values; return both, with what is not written yet."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.count.new_positions, key_states)
        self.values.index_copy_(2, self.count.new_positions, value_states)
        if self.count.visible is None:
            return self.keys, self.values
        return self.keys.narrow(2, 0, self.count.visible), self.values.narrow(2, 0, self.count.visible)

    def get_seq_length(self) -> int:
        """Return the number of tokens before the step, on the device."""
        return self.count.on_device if self.is_initialized else 0  # type: ignore[return-value]  # as transformers does

    @property
    def first(self) -> int:
        """Position in the text of the first token held."""
        return 0

    @property
    def stop(self) -> int:
        """Position in the text after the last token held."""
        return self._stop

    def record_seen(self) -> None:
        """Record that the cache's count holds for this layer."""
        self._stop = self.count.on_host

    def write_tokens(self, first: int, position: int, keys: Tensor, values: Tensor, _capacity: int) -> None:
        """Keep the held tokens before `position`, append these, and forget all others.

        Raises ProtocolError if tokens to keep are missing, or there is no room.
        """
        stop, num_new = self._stop, keys.shape[2]
        if first or position > stop or position + num_new > self.max_cache_len:
            raise ProtocolError(
                f"KV of tokens [{position}, {position + num_new}) arrived at a layer that holds tokens [0, {stop}) of at "
                f"most {self.max_cache_len}"
            )
        if not self.is_initialized or not position:
            self.lazy_initialization(keys, values)
        for held, new in zip(self.read_tokens(position, num_new), (keys, values), strict=True):
            held.copy_(new)
        self._stop = position + num_new


class FixedSlidingLayer(_Fixed, StaticSlidingCacheLayer):
    """Sliding window attention: keeps the tokens of one window, in order, from the first place on."""

    def __init__(self, max_cache_len: int, sliding_window: int, count: TokenCount) -> None:
        super().__init__(max_cache_len, sliding_window)
        self.count = count
        self._first = 0  # while tokens arrive from another worker

    @property
    def first(self) -> int:
        """Position in the text of the first token held."""
        return max(self._first, self.stop - self.max_cache_len)

    @property
    def stop(self) -> int:
        """Position in the text after the last token held."""
        return self.cumulative_length_int

    def record_seen(self) -> None:
        """Record that the cache's count holds for this layer."""
        self._first = 0
        self.cumulative_length_int = self.count.on_host

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for as many rows as the first states [rows, heads, tokens, dim] have, or use what fits again."""
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, new tokens, dim] to keys and values; return those that a new token may attend to."""
        is_full = self.is_initialized and self.cumulative_length_int >= self.max_cache_len
        if not is_full or key_states.shape[2] > 1:
            return super().update(key_states, value_states, *args, **kwargs)
        # As transformers does, but with an index that is made on the device: a graph can't hold a copy from the host.
        assert self.keys is not None
        assert self.values is not None
        self.cumulative_length_int += 1
        last = torch.full((1,), self.max_cache_len - 1, device=self.device)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.copy_(held.roll(-1, dims=2).index_copy_(2, last, new))
        return self.keys, self.values

    def clear(self) -> None:
        """Forget all tokens, and keep the memory for first states of the same shape."""
        super().clear()
        self._first = self.cumulative_length_int = 0
        self.cumulative_length.zero_()

    def write_tokens(self, first: int, position: int, keys: Tensor, values: Tensor, _capacity: int) -> None:
        """Keep the held tokens from `first` to `position`, append these, and forget all others.

        Raises ProtocolError if tokens to keep are missing, or there is no room.
        """
        num_kept, num_new = position - first, keys.shape[2]
        if num_kept + num_new > self.max_cache_len or (num_kept and not self.first <= first <= position <= self.stop):
            raise ProtocolError(
                f"KV of tokens [{position}, {position + num_new}) arrived at a layer that holds tokens [{self.first}, "
                f"{self.stop}) in a window of {self.max_cache_len}"
            )
        if num_kept:
            kept = [each.clone() for each in self.read_tokens(first, num_kept)]
        else:
            self.lazy_initialization(keys, values)
        self._first, self.cumulative_length_int = first, position + num_new
        self.cumulative_length.fill_(self.cumulative_length_int)  # counts on only while the window is not full
        if num_kept:
            for held, old in zip(self.read_tokens(first, num_kept), kept, strict=True):
                held.copy_(old)
        for held, new in zip(self.read_tokens(position, num_new), (keys, values), strict=True):
            held.copy_(new)


class CountingFixedLayer(_FullAttention):
    """Replaces full attention held elsewhere."""

    def get_seq_length(self) -> int:
        """Return the number of tokens before the step, on the device."""
        return self.count.on_device if self.count.on_host else 0  # type: ignore[return-value]  # as transformers does

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: there are no rows."""

    def record_seen(self) -> None:
        """Do nothing: the count is the cache's."""


class CountingFixedSlidingLayer(StaticSlidingCacheLayer):
    """Replaces sliding window attention held elsewhere."""

    def __init__(self, max_cache_len: int, sliding_window: int, count: TokenCount) -> None:
        super().__init__(max_cache_len, sliding_window)
        self.count = count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: there are no rows."""

    def record_seen(self) -> None:
        """Record that the cache's count holds for this layer."""
        self.cumulative_length_int = self.count.on_host


OwnedFixedLayer = FixedLayer | FixedSlidingLayer

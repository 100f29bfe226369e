"""KV layers: growing ones that a stage owns, and counting ones in place of layers held elsewhere.

Each replaces a layer of transformers' DynamicCache, except for `crop`: call `drop_last`. Knows no stages and no sessions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.hf_internals.cache_layers import CacheLayer, SlidingCacheLayer

_GRANULE_TOKENS = 64


class Growth:
    """How much memory to allocate when the KV of one session in one stage has to grow.

    Keys and values of all layers, `num_tensors`, grow together. `reserved_tokens` per row are expected; 0: not known.
    """

    def __init__(self, num_tensors: int, spare_bytes: Callable[[], float]) -> None:
        self.reserved_tokens = 0
        self._num_tensors = num_tensors
        self._spare_bytes = spare_bytes

    def expected(self, num_held: int, num_seen: int) -> int:
        """Return the tokens per row that a tensor will finally hold, given those held and seen now; 0: not known."""
        return num_held + self.reserved_tokens - num_seen if self.reserved_tokens else 0

    def capacity(self, needed: int, capacity: int, expected: int, token_bytes: int) -> int:
        """Return the tokens per row to allocate; `token_bytes` is that of one token of all rows in one tensor.

        Once half of the expected tokens are needed, allocate all of them, so that a long text that may end early takes no
        more memory than with doubling buffers. Beyond the expected number, and if memory is short, add only an eighth.
        """
        roomy, scanty = max(needed, 2 * capacity), needed + needed // 8
        if expected:
            roomy = scanty if needed > expected else expected if expected <= 2 * needed else min(roomy, expected)
        if roomy > needed and (roomy - capacity) * token_bytes * self._num_tensors > self._spare_bytes():
            return min(roomy, scanty)
        return roomy


class GrowingTensor:
    """Keys or values of one layer, [rows, heads, tokens, dim], with room to append.

    Attention reads views of the filled part: on a CPU bit-equal to concatenation, which copies everything for each token. On
    a GPU kernels are chosen by strides too, and differ in their last bits: attention reads a copy there, as if concatenated.
    """

    __slots__ = ("_buffer", "_start", "_stop")

    def __init__(self, states: Tensor) -> None:
        self._buffer = states[:, :, :0]
        self._start = self._stop = 0

    def __len__(self) -> int:
        """Return the number of tokens held."""
        return self._stop - self._start

    @property
    def view(self) -> Tensor:
        """The tokens held, [rows, heads, tokens, dim]; valid until the next change."""
        return self._buffer.narrow(2, self._start, self._stop - self._start)

    @property
    def dtype(self) -> torch.dtype:
        """That of the tokens held."""
        return self._buffer.dtype

    @property
    def location(self) -> tuple[int, int, int]:
        """The address of the first token held, and the strides of heads and tokens, in elements; valid until the next change."""
        _, head, token, _ = self._buffer.stride()
        return self._buffer.data_ptr() + self._start * token * self._buffer.element_size(), head, token

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._buffer.nbytes

    @property
    def capacity(self) -> int:
        """Tokens per row that are allocated."""
        return self._buffer.shape[2]

    def reserve(self, num_tokens: int) -> None:
        """Allocate room for `num_tokens` tokens; only while none is held."""
        self._allocate(self._buffer.shape[0], num_tokens)

    def append(self, states: Tensor, growth: Growth, expected: int) -> Tensor:
        """Append [rows, heads, new tokens, dim], in the wider dtype as `torch.cat` does; return what attention is to read.

        If there is no room, `growth` decides how much to allocate, given the tokens expected in the end.
        """
        if states.dtype != self._buffer.dtype:  # autocast was turned on or off since
            self._buffer = self._buffer.to(torch.promote_types(states.dtype, self._buffer.dtype))
        num_new = states.shape[2]
        self.extend(num_new, growth, expected)
        self._buffer.narrow(2, self._stop - num_new, num_new).copy_(states)
        return self.view.contiguous() if self._buffer.is_cuda else self.view

    def extend(self, num_new: int, growth: Growth, expected: int) -> None:
        """Hold so many more tokens, which are still to be written."""
        if self._stop + num_new > self._buffer.shape[2]:
            self._make_room(num_new, growth, expected)
        self._stop += num_new

    def _make_room(self, num_new: int, growth: Growth, expected: int) -> None:
        held, source, capacity = len(self), self.view, self._buffer.shape[2]
        # If enough was dropped in front, the tokens fit there without overlap.
        if self._start < held or held + num_new > capacity:
            rows, heads, _, dim = self._buffer.shape
            token_bytes = rows * heads * dim * self._buffer.element_size()
            self._allocate(rows, growth.capacity(held + num_new, capacity, expected, token_bytes))
        self._fill(source)

    def _allocate(self, num_rows: int, num_tokens: int) -> None:
        capacity = -(-num_tokens // _GRANULE_TOKENS) * _GRANULE_TOKENS
        _, heads, _, dim = self._buffer.shape
        self._buffer = self._buffer.new_empty((num_rows, heads, capacity, dim))

    def _fill(self, states: Tensor) -> None:
        self._start, self._stop = 0, states.shape[2]
        self._buffer.narrow(2, 0, self._stop).copy_(states)

    def replace(self, states: Tensor) -> None:
        """Replace all tokens by a copy of these."""
        self._allocate(states.shape[0], states.shape[2])
        self._fill(states)

    def copy(self, num_dropped: int = 0) -> GrowingTensor:
        """Return a tensor that holds copies of the same tokens, less the last `num_dropped`."""
        kept = self.view.narrow(2, 0, max(0, len(self) - num_dropped))
        copied = GrowingTensor(kept)
        copied.replace(kept)
        return copied

    def keep_last(self, num_tokens: int) -> None:
        """Remove tokens at the start until at most `num_tokens` are left."""
        self._start = max(self._start, self._stop - num_tokens)

    def drop_last(self, num_tokens: int) -> None:
        """Remove tokens at the end."""
        self._stop = max(self._start, self._stop - num_tokens)

    def append_rows(self, others: Sequence[GrowingTensor]) -> None:
        """Append the rows of others, which hold as many tokens."""
        states = torch.cat([self.view, *(other.view for other in others)])
        self._buffer = self._buffer.to(states.dtype)
        self._allocate(len(states), self._buffer.shape[2])
        self._fill(states)

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows with these indices, in this order."""
        states = self.view.index_select(0, rows.to(self._buffer.device))
        self._allocate(len(rows), self._buffer.shape[2])
        self._fill(states)


class _Growing:
    """Base of the growing layers, with keys and values in growing tensors (transformers' `keys` and `values` stay None)."""

    _keeps_all = False  # tokens, so that those at the end can be left out of a copy
    _grown: tuple[GrowingTensor, ...] = ()
    growth: Growth  # of the session in the stage; changes when another stage adopts the layer

    if TYPE_CHECKING:

        def get_seq_length(self) -> int: ...

        def drop_last(self, num_tokens: int) -> None: ...

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set shapes, dtype and device from the first states."""
        self._grown = (GrowingTensor(key_states.detach()), GrowingTensor(value_states.detach()))
        self.is_initialized = True

    def _extend(self, grown: GrowingTensor, states: Tensor, expected: int) -> Tensor:
        """Append tokens; return those held, in a tensor of its own if it may be part of an autograd graph."""
        if torch.is_inference_mode_enabled():
            return grown.append(states, self.growth, expected)
        joined = torch.cat([grown.view, states], dim=2)
        with torch.inference_mode():  # what was allocated in it can be changed in no other mode
            grown.append(states.detach(), self.growth, expected)
        return joined

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows with the indices `beam_idx`, in this order."""
        for each in self._grown:
            each.reorder(beam_idx)

    def append_rows(self, others: Sequence[Self]) -> None:
        """Append the rows of layers that hold the same tokens of other rows."""
        for own, *more in zip(self._grown, *(other._grown for other in others), strict=True):  # noqa: SLF001 - of the same class
            own.append_rows(more)

    def copy(self, growth: Growth, num_dropped: int = 0) -> Self:
        """Return an independent layer that holds copies of the same tokens, less the last `num_dropped`."""
        copied = copy.copy(self)
        dropped = num_dropped if self._keeps_all else 0
        vars(copied).update(growth=growth, _grown=tuple(each.copy(dropped) for each in self._grown))
        if num_dropped > dropped:
            copied.drop_last(num_dropped)
        return copied

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(each.nbytes for each in self._grown)

    @property
    def first(self) -> int:
        """Position in the text of the first token held."""
        return self.stop - len(self._grown[0]) if self._grown else 0

    @property
    def stop(self) -> int:
        """Position in the text after the last token held."""
        return self.get_seq_length()

    def _record_seen(self, num_tokens: int) -> None:
        """Record how many tokens the layer has seen in total."""

    def read_tokens(self, position: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of tokens from a position on, [rows, heads, tokens, dim]; valid until the next change."""
        offset = position - self.first
        keys, values = (each.view.narrow(2, offset, num_tokens) for each in self._grown)
        return keys, values

    @property
    def capacity(self) -> int:
        """Tokens per row that are allocated."""
        return self._grown[0].capacity if self._grown else 0

    @property
    def num_rows(self) -> int:
        """Number of rows held."""
        return self._grown[0].view.shape[0] if self._grown else 0

    def write_tokens(self, first: int, position: int, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Keep the held tokens from `first` to `position`, append these, and remove all others.

        A layer without tokens to keep allocates `capacity` tokens per row, as its source has. Raises ProtocolError if
        tokens to keep are missing.
        """
        num_kept, stop = position - first, self.stop
        if num_kept and not (self._grown and self.first <= first and position <= stop):
            raise ProtocolError(
                f"KV from token {position} on arrived at a layer that holds tokens [{self.first}, {stop})"
            )
        if not num_kept:
            self.lazy_initialization(keys, values)
            for grown in self._grown:
                grown.reserve(capacity)
        for grown, states in zip(self._grown, (keys, values), strict=True):
            if num_kept:
                grown.drop_last(max(0, stop - position))
                grown.keep_last(num_kept)
            grown.append(states, self.growth, capacity)
        self._record_seen(position + keys.shape[2])


class GrowingLayer(_Growing, CacheLayer):
    """Full attention: keeps every token."""

    _keeps_all = True

    def __init__(self, growth: Growth) -> None:
        super().__init__()
        self.growth = growth

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, new tokens, dim] to keys and values; return all tokens of both."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._grown
        expected = self.growth.reserved_tokens
        return self._extend(keys, key_states, expected), self._extend(values, value_states, expected)

    def make_room(self, dtype: torch.dtype) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
        """Hold one more token, which the caller writes; return where keys and values lie (`GrowingTensor.location`).

        None if no tokens of this dtype are held: then call `update`.
        """
        if not self._grown:
            return None
        keys, values = self._grown
        if keys.dtype is not dtype or values.dtype is not dtype:
            return None
        keys.extend(1, self.growth, self.growth.reserved_tokens)
        values.extend(1, self.growth, self.growth.reserved_tokens)
        return keys.location, values.location

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return len(self._grown[0]) if self._grown else 0

    def drop_last(self, num_tokens: int) -> None:
        """Remove tokens at the end."""
        for each in self._grown:
            each.drop_last(num_tokens)


class GrowingSlidingLayer(_Growing, SlidingCacheLayer):
    """Sliding window attention: keeps the last ``window - 1`` tokens, or all of them while the past is recorded.

    A window of one token keeps all tokens as well, since transformers slices with ``[-window + 1:]``.
    """

    def __init__(self, sliding_window: int, growth: Growth) -> None:
        super().__init__(sliding_window)
        self.growth = growth

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, new tokens, dim] to keys and values; return those that a new token may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        keys, values = self._grown
        return self._append(keys, key_states), self._append(values, value_states)

    def _record_seen(self, num_tokens: int) -> None:
        self.cumulative_length = num_tokens

    def _append(self, grown: GrowingTensor, states: Tensor) -> Tensor:
        num_kept, num_new = self.sliding_window - 1, states.shape[2]
        expected = self.growth.expected(len(grown), self.cumulative_length - num_new)
        if self.record_past:
            held = self._extend(grown, states, expected)
            num_visible = min(held.shape[2], num_kept + num_new)
            return held.narrow(2, held.shape[2] - num_visible, num_visible)
        if num_new > num_kept > 0:  # a long prompt: nearly all of it would be removed again
            visible = torch.cat([grown.view, states], dim=2)
            grown.replace(states.detach().narrow(2, num_new - num_kept, num_kept))
            return visible
        if num_kept:  # with more room than this, tokens that have left the window are overwritten
            most = 2 * num_kept + num_new
            expected = min(expected or most, most)
        visible = self._extend(grown, states, expected)
        if num_kept:
            grown.keep_last(num_kept)
        return visible

    def drop_last(self, num_tokens: int) -> None:
        """Remove tokens at the end, and those that were recorded beyond the window."""
        is_full = self.cumulative_length >= self.sliding_window
        for each in self._grown:
            each.drop_last(num_tokens)
            if is_full and (self.sliding_window > 1 or num_tokens):
                each.keep_last(self.sliding_window - 1)
        self.cumulative_length = max(0, self.cumulative_length - num_tokens)


class _Counting:
    """Base of the layers in place of those held elsewhere, which return lengths and mask sizes."""

    cumulative_length = 0
    is_initialized = False

    def advance(self, num_tokens: int) -> None:
        """Count tokens that the real layer has seen."""
        self.cumulative_length += num_tokens
        self.is_initialized = True

    def drop_last(self, num_tokens: int) -> None:
        """Count fewer tokens."""
        self.cumulative_length = max(0, self.cumulative_length - num_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: there are no rows."""


class CountingLayer(_Counting, CacheLayer):
    """Replaces full attention held elsewhere."""

    def get_seq_length(self) -> int:
        """Return the number of tokens counted."""
        return self.cumulative_length


class CountingSlidingLayer(_Counting, SlidingCacheLayer):
    """Replaces sliding window attention held elsewhere."""

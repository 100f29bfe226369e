"""KV layers of full and sliding attention that a stage owns, which grow.

Each replaces a layer of transformers' DynamicCache, except for `crop`: call `drop_last`. Knows no stages and no sessions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.hf_internals.cache_layers import CacheLayer, SlidingCacheLayer
from lingualinked.model.kv.growing_tensor import GrowingTensor, Growth


class _Growing:
    """Base of the growing layers, with keys and values in growing tensors."""

    _keeps_all = False  # tokens, so that those at the end can be left out of a copy
    _grown: tuple[GrowingTensor, ...] = ()
    growth: Growth  # of the session in the stage; changes when another stage adopts the layer

    if TYPE_CHECKING:

        def get_seq_length(self) -> int: ...

        def drop_last(self, num_tokens: int) -> None: ...

    def _held(self, index: int) -> Tensor | None:
        return self._grown[index].view if self._grown else None

    # Some models ask whether there are any. What transformers' constructors set is not kept.
    keys = property(lambda self: self._held(0), lambda _self, _value: None)
    values = property(lambda self: self._held(1), lambda _self, _value: None)

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

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes from a row to the next one, of keys and of values; valid until the next change."""
        keys, values = self._grown
        return keys.row_bytes, values.row_bytes

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

"""Keys or values of one layer, in a buffer with room to append, and how much room that is.

Knows tensors and bytes; no layers and no sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_GRANULE_TOKENS = 64
_VECTOR_BYTES = 16


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
    def row_bytes(self) -> int:
        """Bytes from a row to the next one; valid until the next change."""
        return self._buffer.stride(0) * self._buffer.element_size()

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
        # Heads of odd sizes lie elsewhere within a vector's width than if concatenated, and products sum them in another order.
        is_aligned = self._buffer.shape[3] * self._buffer.element_size() % _VECTOR_BYTES == 0
        return self.view if is_aligned and not self._buffer.is_cuda else self.view.contiguous()

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

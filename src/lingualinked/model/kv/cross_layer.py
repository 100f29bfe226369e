"""KV of cross-attention: keys and values of the encoder's output, which never change once they are made.

Knows no stages and no sessions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.hf_internals.cache_layers import CacheLayer


class CrossLayer(CacheLayer):
    """Keys and values, [rows, heads, source tokens, dim], of one layer."""

    first = 0  # of the source tokens
    keys: Any
    values: Any

    def copy(self, *_args: Any) -> Self:
        """Return an independent layer of the same rows; of the text, which is what may be left out, it holds nothing."""
        copied = copy.copy(self)
        if self.is_initialized:
            copied.keys, copied.values = self.keys.clone(), self.values.clone()
        return copied

    def append_rows(self, others: Sequence[Self]) -> None:
        """Append the rows of layers of as many source tokens."""
        if self.is_initialized:
            self.keys = torch.cat([self.keys, *(each.keys for each in others)])
            self.values = torch.cat([self.values, *(each.values for each in others)])

    def drop_last(self, num_tokens: int) -> None:
        """Do nothing: the text gets shorter, and its source does not."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    @property
    def num_rows(self) -> int:
        """Number of rows held."""
        return len(self.keys) if self.is_initialized else 0

    @property
    def stop(self) -> int:
        """Number of source tokens."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def capacity(self) -> int:
        """Number of source tokens."""
        return self.stop

    def read_tokens(self, position: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of source tokens from a position on, [rows, heads, tokens, dim]."""
        return self.keys.narrow(2, position, num_tokens), self.values.narrow(2, position, num_tokens)

    def write_tokens(self, first: int, position: int, keys: Tensor, values: Tensor, capacity: int) -> None:  # noqa: ARG002
        """Append source tokens to those up to `position`; raise ProtocolError if some of them are missing."""
        if position > self.stop:
            raise ProtocolError(f"KV of source token {position} on arrived at a layer that holds {self.stop} of them")
        if position:
            keys, values = (
                torch.cat([held.narrow(2, 0, position), new], dim=2)
                for held, new in ((self.keys, keys), (self.values, values))
            )
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys.contiguous(), values.contiguous()

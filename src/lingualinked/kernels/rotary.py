"""Rotary embeddings of one new token per row, queries and keys at once.

Knows the one way in which the models' functions round; not which of them do: who calls compares. `rotary.c` has it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lingualinked.kernels import native

_NEEDED_FLAGS = frozenset({"avx", "avx2", "f16c"})
_DIM_MULTIPLE = 16
_ARGUMENTS = struct.Struct("@2P3l2P3l2P4l" + native.TEAM)  # `struct rotary` of rotary.c, whose team it does not need


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return native.is_available("rotary", _NEEDED_FLAGS)


def accepts(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> bool:
    """Say whether the kernel rotates queries and keys that lie like these."""
    return queries.stride(3) == keys.stride(3) == 1 and cosines.is_contiguous() and sines.is_contiguous()


def accepts_shapes(dtype: torch.dtype, queries: Sequence[int], keys: Sequence[int], angles: Sequence[int]) -> bool:
    """Say whether the kernel rotates queries and keys, ``[rows, heads, 1, dim]``, by angles ``[rows or 1, 1, dim]``."""
    num_rows, _, num_tokens, dim = queries
    return (
        dtype in native.DTYPES
        and num_tokens == 1
        and dim % _DIM_MULTIPLE == 0
        and keys[0] == num_rows
        and tuple(keys[2:]) == (1, dim)
        and tuple(angles) in ((1, 1, dim), (num_rows, 1, dim))
        and 0 not in (*queries, *keys)
    )


def rotate(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rotate queries and keys; return None if a result is not finite."""
    num_rows, num_heads, _, dim = queries.shape
    num_key_heads = keys.shape[1]
    results = queries.new_empty(num_rows, num_heads, 1, dim), keys.new_empty(num_rows, num_key_heads, 1, dim)
    is_finite = native.call(
        "rotary",
        "rotary",
        _ARGUMENTS,
        queries.data_ptr(),
        results[0].data_ptr(),
        num_heads,
        *queries.stride()[:2],
        keys.data_ptr(),
        results[1].data_ptr(),
        num_key_heads,
        *keys.stride()[:2],
        cosines.data_ptr(),
        sines.data_ptr(),
        dim if len(cosines) > 1 else 0,
        num_rows,
        dim,
        native.DTYPES[queries.dtype],
    )
    return results if is_finite else None

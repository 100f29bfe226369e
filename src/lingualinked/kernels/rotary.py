"""Rotary embeddings of one new token per row, or of some tokens of a single row, queries and keys at once.

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
_MAX_TOKENS = 64  # of a single row
_ARGUMENTS = struct.Struct("@2P3l2P3l2P4l" + native.TEAM)  # `struct rotary` of rotary.c, whose team it does not need


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return native.is_available("rotary", _NEEDED_FLAGS)


def accepts(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> bool:
    """Say whether the kernel rotates queries and keys that lie like these; several tokens lie one after the other."""
    return (
        queries.stride(3) == keys.stride(3) == 1
        and cosines.is_contiguous()
        and sines.is_contiguous()
        and all(each.shape[2] == 1 or each.transpose(1, 2).is_contiguous() for each in (queries, keys))
    )


def accepts_shapes(dtype: torch.dtype, queries: Sequence[int], keys: Sequence[int], angles: Sequence[int]) -> bool:
    """Say whether the kernel rotates queries and keys, ``[rows, heads, tokens, dim]``, by angles ``[rows or 1, tokens, dim]``."""
    num_rows, _, num_tokens, dim = queries
    return (
        dtype in native.DTYPES
        and (num_tokens == 1 or (num_rows == 1 and num_tokens <= _MAX_TOKENS))
        and dim % _DIM_MULTIPLE == 0
        and keys[0] == num_rows
        and tuple(keys[2:]) == (num_tokens, dim)
        and tuple(angles) in ((1, num_tokens, dim), (num_rows, num_tokens, dim))
        and 0 not in (*queries, *keys)
    )


def rotate(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rotate queries and keys; return None if a result is not finite."""
    if queries.shape[2] > 1:  # as rows of one token each
        as_rows = queries.transpose(0, 2), keys.transpose(0, 2), cosines.transpose(0, 1), sines.transpose(0, 1)
        rotated = rotate(*as_rows)
        return None if rotated is None else (rotated[0].transpose(0, 2), rotated[1].transpose(0, 2))
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


def pack(
    heads: Sequence[tuple[int, int, int]],
    cosines: int,
    sines: int,
    num_angles: int,
    num_rows: int,
    dim: int,
    dtype: torch.dtype,
) -> bytes:
    """Return the structure of `rotate`, given addresses of states and results, and numbers of heads: of queries, then of keys.

    All lie in contiguous ``[rows, heads, dim]``.
    """
    both = [(*each, each[2] * dim, dim) for each in heads]
    angle_stride = dim if num_angles > 1 else 0
    return _ARGUMENTS.pack(
        *both[0], *both[1], cosines, sines, angle_stride, num_rows, dim, native.DTYPES[dtype], *native.team()
    )

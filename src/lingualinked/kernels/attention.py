"""Attention in bfloat16 or float16: of few new tokens, at the speed at which memory gives keys and values, and of a prompt's chunks.

Knows the orders in which torch computes it where MKL multiplies with AVX2 instructions; not whether torch does so here: who
calls compares. `attention.c` and `attention_products.h` have the orders.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lingualinked.kernels import native

_MAX_TOKENS = 767  # new ones
_NEEDED_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"})
_DTYPES = (torch.bfloat16, torch.float16)  # as attention_products.h numbers them
_NO_MASK, _CHOICES, _ADDENDS, _CAUSAL = range(4)
_MAX_DIM = 256
_DIM_MULTIPLE = 8
_MIN_DIM = 16  # of several queries; MKL adds up fewer than 12 dimensions otherwise
_BLOCKS = ((192, 64), (1, 32))  # how many queries of a head torch multiplies at once, from so many on
_MIN_REST = 4  # of queries in the last block, which are added up as those in the others
_ARGUMENTS = struct.Struct("@6P21ld4Pl" + native.TEAM)  # `struct attention` of attention.c
_TEXT = struct.Struct("@P2lP5l")  # its `struct text`


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return sys.platform == "linux" and native.is_available("attention", _NEEDED_FLAGS)


def block_of(num_new: int) -> int:
    """Return how many of so many queries of one head torch multiplies at once; those that are left over are a block, too."""
    return min(num_new, next(size for least, size in _BLOCKS if num_new >= least))


def like_blocks(num_new: int) -> int:
    """Return the smallest number of queries that come in the same blocks, the last one included, as so many."""
    block = block_of(num_new)
    least = next((least for least, size in _BLOCKS if size == block), 1)
    full = max(block, -(-least // block) * block)
    return min(num_new, full + num_new % block)


def accepts(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, together: int) -> bool:
    """Say whether the kernel computes attention of ``query`` ``[rows, heads, tokens, dim]``, whatever its bits.

    `together` is the number of queries that torch multiplies at once.
    """
    num_rows, num_heads, num_new, dim = query.shape
    return (
        num_new <= _MAX_TOKENS
        and (num_new <= together or num_new % together == 0 or num_new % together >= _MIN_REST)
        and query.dtype is keys.dtype is values.dtype
        and query.dtype in _DTYPES
        and query.is_cpu
        and (1 if together == 1 else _MIN_DIM) <= dim <= _MAX_DIM
        and not dim % _DIM_MULTIPLE
        and keys.shape == values.shape
        and keys.shape[3] == dim
        and keys.shape[2] > 0
        and all(map(_lies_in_rows, (query, keys, values)))
        # With one product alone, torch shares out its tokens among threads, which changes how they are added.
        and (num_rows * num_heads * num_new > together or torch.get_num_threads() == 1)
        and (mask is None or _is_known_mask(mask, query, keys))
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    together: int = 1,
    logsums: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Return attention, ``[rows, tokens, heads, dim]``, of ``[rows, heads, tokens, dim]`` over ``[rows, key heads, .., dim]``.

    `mask` ``[rows or 1, heads or 1, tokens, ..]`` is true for keys that count, or is added to scores; `logsums`, float32
    ``[rows, heads, tokens]``, receives the logarithms of the sums of exponentials. Causal attention has no mask, as many
    queries as keys, more than three, and a positive scale: each query sees its own key and those before.
    """
    num_rows, num_heads, num_new, dim = query.shape
    result = query.new_empty(num_rows, num_new, num_heads, dim)
    mask_kind = _CAUSAL if is_causal else _NO_MASK
    mask_strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        mask_kind = _CHOICES if mask.dtype is torch.bool else _ADDENDS
        mask_strides = mask.expand(num_rows, num_heads, num_new, -1).stride()[:3]
    native.call(
        "attention",
        "attention",
        _ARGUMENTS,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        result.data_ptr(),
        0 if logsums is None else logsums.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        *mask_strides,
        num_rows,
        num_heads,
        num_heads // keys.shape[1],
        num_new,
        keys.shape[2],
        dim,
        together,
        _DTYPES.index(query.dtype),
        mask_kind,
        scale,
        *_mathematics(),
        0,
        0,
    )
    return result


Location = tuple[int, int, int]
"""The address of the first token of keys or values, and the strides of heads and tokens, in elements."""


class Text(NamedTuple):
    """A text with one new token, as `struct text` of attention.c describes it."""

    keys: Location  # of [1, key heads, its tokens, dim], dimensions side by side
    values: Location
    num_tokens: int
    place: int  # of the new token in the pass
    appends: bool  # whether its key and value are still to be written behind the others, which have room for them


def attend_texts(
    query: Tensor, new_keys: Tensor, new_values: Tensor, texts: Sequence[Text], scale: float, result: Tensor
) -> None:
    """Compute attention of the one new token of each text over the text alone, without a mask: with the bits of `attend`.

    All places of a pass have ``query`` ``[1, heads, places, dim]``, new keys and values ``[1, key heads, places, dim]``, and
    `result` ``[1, places, heads, dim]``, contiguous, which is filled in the places of the texts.
    """
    described = b"".join(_TEXT.pack(*keys, *values, *others) for keys, values, *others in texts)
    memory = ctypes.create_string_buffer(described, len(described))
    _, num_heads, _, dim = query.shape
    native.call(
        "attention",
        "attention",
        _ARGUMENTS,
        query.data_ptr(),
        new_keys.data_ptr(),
        new_values.data_ptr(),
        result.data_ptr(),
        *(0, 0),
        *query.stride()[:3],
        *new_keys.stride()[:3],
        *new_values.stride()[:3],
        *(0, 0, 0),
        1,
        num_heads,
        num_heads // new_keys.shape[1],
        1,
        0,
        dim,
        1,
        _DTYPES.index(query.dtype),
        _NO_MASK,
        scale,
        *_mathematics(),
        ctypes.addressof(memory),
        len(texts),
    )


def pack_texts(
    states: Sequence[int],
    texts: int,
    num_texts: int,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    scale: float,
) -> bytes:
    """Return the structure of `attend_texts`, for as many places as texts, by addresses.

    `states` are queries, new keys, new values and results, all contiguous ``[places, heads, dim]``; `heads` are those of
    queries and of keys.
    """
    num_heads, num_key_heads = heads
    return _ARGUMENTS.pack(
        *states,
        *(0, 0),
        *(0, dim, num_heads * dim),
        *(0, dim, num_key_heads * dim),
        *(0, dim, num_key_heads * dim),
        *(0, 0, 0),
        1,
        num_heads,
        num_heads // num_key_heads,
        1,
        0,
        dim,
        1,
        _DTYPES.index(dtype),
        _NO_MASK,
        scale,
        *_mathematics(),
        texts,
        num_texts,
        *native.team(),
    )


def describe_rows(
    keys: Location, key_row: int, values: Location, value_row: int, num_rows: int, num_tokens: int
) -> bytes:
    """Describe rows as texts of one new token, given where the first one lies, and the bytes between rows."""
    (key, *key_strides), (value, *value_strides) = keys, values
    return b"".join(
        _TEXT.pack(key + row * key_row, *key_strides, value + row * value_row, *value_strides, num_tokens, row, 1)
        for row in range(num_rows)
    )


TEXT_BYTES = _TEXT.size


def _lies_in_rows(states: Tensor) -> bool:
    """Say whether dimensions lie side by side, and heads and tokens do not overlap: torch multiplies others otherwise."""
    _, num_heads, num_tokens, dim = states.shape
    return (
        states.stride(3) == 1
        and (num_heads == 1 or states.stride(1) >= dim)
        and (num_tokens == 1 or states.stride(2) >= dim)
    )


def _is_known_mask(mask: Tensor, query: Tensor, keys: Tensor) -> bool:
    num_rows, num_heads, num_new, _ = query.shape
    return (
        mask.dtype in (torch.bool, query.dtype)
        and mask.dim() == 4
        and mask.shape[0] in (1, num_rows)
        and mask.shape[1] in (1, num_heads)
        and mask.shape[2:] == (num_new, keys.shape[2])
        and (mask.stride(3) == 1 or mask.shape[3] == 1)
    )


@functools.cache
def _mathematics() -> tuple[int, ...]:
    """Return the functions of the C library that torch calls for what does not fill a vector."""
    library = ctypes.CDLL("libm.so.6")
    functions = (library.exp, library.expf, library.logf)
    return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)

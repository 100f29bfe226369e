"""Attention of one new token per row in bfloat16, at the speed at which memory gives keys and values.

Knows the one order in which torch computes it where MKL multiplies bfloat16 with AVX2 instructions; not whether torch does so
here: who calls compares. `attention.c` has the order.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys

import torch
from torch import Tensor

from lingualinked.kernels import native

_NEEDED_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})
_MAX_DIM = 256
_DIM_MULTIPLE = 8
_ARGUMENTS = struct.Struct("@5P9l5ld3P" + native.TEAM)  # `struct attention` of attention.c


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return sys.platform == "linux" and native.is_available("attention", _NEEDED_FLAGS)


def accepts(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Say whether the kernel computes attention of ``query`` ``[rows, heads, tokens, dim]``, whatever its bits."""
    dim = query.shape[3]
    return (
        query.shape[2] == 1
        and query.dtype is keys.dtype is values.dtype is torch.bfloat16
        and query.is_cpu
        and dim <= _MAX_DIM
        and not dim % _DIM_MULTIPLE
        and query.stride(3) == keys.stride(3) == values.stride(3) == 1
        and keys.shape == values.shape
        and keys.shape[3] == dim
        and keys.shape[2] > 0
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, logsums: Tensor | None = None) -> Tensor:
    """Return attention, ``[rows, 1, heads, dim]``, of ``[rows, heads, 1, dim]`` over ``[rows, key heads, tokens, dim]``.

    `logsums`, float32 ``[rows, heads]``, receives the logarithms of the sums of exponentials.
    """
    num_rows, num_heads, _, dim = query.shape
    result = query.new_empty(num_rows, 1, num_heads, dim)
    native.call(
        "attention",
        "attention",
        _ARGUMENTS,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        result.data_ptr(),
        0 if logsums is None else logsums.data_ptr(),
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        num_rows,
        num_heads,
        num_heads // keys.shape[1],
        keys.shape[2],
        dim,
        scale,
        *_mathematics(),
    )
    return result


@functools.cache
def _mathematics() -> tuple[int, ...]:
    """Return the functions of the C library that torch calls for what does not fill a vector."""
    library = ctypes.CDLL("libm.so.6")
    functions = (library.exp, library.expf, library.logf)
    return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)

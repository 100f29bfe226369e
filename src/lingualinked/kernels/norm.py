"""RMS norms of rows, in one pass over memory.

Knows the one order in which torch sums squares on x86, whatever its instruction set; not whether torch does so here, nor which
modules compute such norms: who calls compares. `norm.c` has the order.
"""

from __future__ import annotations

import enum
import struct

import torch
from torch import Tensor

from lingualinked.kernels import native

_NEEDED_FLAGS = frozenset({"avx", "avx2", "f16c"})
_MIN_SIZE = 8
_MAX_ELEMENTS = 1 << 19
_ARGUMENTS = struct.Struct("@3P4ld" + native.TEAM)  # `struct norm` of norm.c, whose team it does not need


class Kind(enum.IntEnum):
    """What normalised values, in float32, are multiplied with before they are rounded."""

    WEIGHTED = 0
    ROUNDED_AND_WEIGHTED = 1
    WEIGHTED_BY_ONE_MORE = 2


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return native.is_available("norm", _NEEDED_FLAGS)


def most_rows(size: int) -> int:
    """Return how many rows of this size the kernel normalises."""
    return _MAX_ELEMENTS // size


def accepts(dtype: torch.dtype, num_rows: int, size: int) -> bool:
    """Say whether the kernel normalises so many rows of this size."""
    return dtype in native.DTYPES and size >= _MIN_SIZE and 0 < num_rows * size <= _MAX_ELEMENTS


def normalise(states: Tensor, weight: Tensor, kind: Kind, epsilon: float) -> Tensor | None:
    """Divide rows by the root of their mean square, and weigh them; return None if a result is not finite.

    States ``[..., size]`` and weight ``[size]`` are contiguous and of one dtype, as `accepts` takes them.
    """
    result = torch.empty_like(states)
    size = states.shape[-1]
    is_finite = native.call(
        "norm",
        "norm",
        _ARGUMENTS,
        states.data_ptr(),
        weight.data_ptr(),
        result.data_ptr(),
        states.numel() // size,
        size,
        native.DTYPES[states.dtype],
        kind,
        epsilon,
    )
    return result if is_finite else None


def pack(
    states: int, weight: int, result: int, num_rows: int, size: int, dtype: torch.dtype, kind: Kind, epsilon: float
) -> bytes:
    """Return the structure of `normalise`, by addresses."""
    return _ARGUMENTS.pack(states, weight, result, num_rows, size, native.DTYPES[dtype], kind, epsilon, *native.team())

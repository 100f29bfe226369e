"""Products of functions of gates with other values in bfloat16 or float16, by tables of the functions; and sums.

Knows no function: torch fills the tables. Whether torch rounds products and sums as `gated.c` does, finds out who calls.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from lingualinked.kernels import native

NAME = "gated"
DTYPES = (torch.float16, torch.bfloat16)
NUM_VALUES = 1 << 16

GATED = struct.Struct("@4P3l" + native.TEAM)  # `struct gated` of gated.c
SUM = struct.Struct("@3P2l")  # its `struct sum`
_NEEDED_FLAGS = frozenset({"avx", "avx2", "f16c"})


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return native.is_available(NAME, _NEEDED_FLAGS)


def all_values(dtype: torch.dtype) -> Tensor:
    """Return all numbers of a dtype of 16 bits, in the order of their bits."""
    return torch.arange(NUM_VALUES, dtype=torch.int32).to(torch.int16).view(dtype)


def fill_table(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Return what a function of single numbers makes of all numbers of a dtype, and one value that does not count."""
    results = function(all_values(dtype))
    return torch.cat([results, results[:1]])


def gate(gates: Tensor, values: Tensor, table: Tensor) -> Tensor | None:
    """Multiply values with what the table has for gates of the same shape; return None if a product is not finite.

    Both are contiguous, and of the dtype of the table.
    """
    result = torch.empty_like(values)
    is_finite = native.call(
        NAME,
        "gate",
        GATED,
        gates.data_ptr(),
        values.data_ptr(),
        table.data_ptr(),
        result.data_ptr(),
        values.numel(),
        native.DTYPES[values.dtype],
        0,
    )
    return result if is_finite else None


def add(first: Tensor, second: Tensor) -> Tensor | None:
    """Add two contiguous tensors of one shape and dtype; return None if a sum is not finite."""
    result = torch.empty_like(first)
    addresses = first.data_ptr(), second.data_ptr(), result.data_ptr()
    is_finite = native.call_alone(NAME, "add", SUM, *addresses, first.numel(), native.DTYPES[first.dtype])
    return result if is_finite else None

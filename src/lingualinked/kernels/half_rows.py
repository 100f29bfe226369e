"""A product of few rows with a float16 or bfloat16 weight as torch stores it, which is read once for all rows.

Knows the order in which torch's own dot products sum on x86; not whether torch computes with them here: who calls compares.
`half_rows.c` has the order.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lingualinked.kernels import native

MAX_ROWS = 16

_NEEDED_FLAGS = frozenset({"avx", "avx2", "fma", "f16c"})
_INPUTS_MULTIPLE = 16  # torch rounds the products of what is left over
_ARGUMENTS = struct.Struct("@3P3li" + native.TEAM)  # `struct product` of half_rows.c


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return native.is_available("half_rows", _NEEDED_FLAGS)


def accepts(num_rows: int, in_features: int) -> bool:
    """Say whether the kernel multiplies so many rows of so many inputs."""
    return num_rows <= MAX_ROWS and in_features % _INPUTS_MULTIPLE == 0


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply up to `MAX_ROWS` contiguous rows ``[M, K]`` with a contiguous weight ``[N, K]``, to ``[M, N]``."""
    (num_rows, in_features), out_features = rows.shape, len(weight)
    inputs = rows.float()
    result = inputs.new_empty(num_rows, out_features)
    native.call(
        "half_rows",
        "multiply",
        _ARGUMENTS,
        inputs.data_ptr(),
        weight.data_ptr(),
        result.data_ptr(),
        num_rows,
        in_features,
        out_features,
        weight.dtype is torch.bfloat16,
    )
    return (result if bias is None else result.add_(bias)).to(rows.dtype)

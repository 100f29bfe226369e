"""A product of few rows with a packed bfloat16 weight, at the speed at which memory gives the weight.

Knows the one layout of weights that oneDNN packs for AVX512-BF16; not whether torch sums in the same order: who calls
compares. `few_rows.c` has the order.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torch.nn import functional

from lingualinked.kernels import native

MAX_ROWS = 192
BLOCK_OUTPUTS = 64
CHUNKS = (512, 1024)
"""Inputs whose products oneDNN adds up before it adds them to the others: for one row, and for several."""

_STORED_INPUTS = 32  # inputs are filled up with zeros to a multiple of it
_NEEDED_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
_ARGUMENTS = struct.Struct("@4P5l" + native.TEAM)  # `struct product` of few_rows.c


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return native.is_available("few_rows", _NEEDED_FLAGS)


def is_known_layout(packed: Tensor, in_features: int, out_features: int) -> bool:
    """Say whether a weight that oneDNN packed is as large as in the layout that the kernel reads."""
    stored = _filled(in_features, _STORED_INPUTS) * _filled(out_features, BLOCK_OUTPUTS)
    return num_bytes(packed) == 2 * stored


def num_bytes(packed: Tensor) -> int:
    """Return the size of a packed weight."""
    return int(torch.ops.mkldnn._nbytes(packed))  # noqa: SLF001 - what torch.compile asks


def address(packed: Tensor) -> int:
    """Return where a packed weight lies."""
    return int(torch.ops.mkldnn.data_ptr(packed))


def multiply(states: Tensor, weight: int, bias: Tensor | None, out_features: int, chunk: int) -> Tensor:
    """Multiply up to `MAX_ROWS` rows, ``[..., K]``, with the packed weight at an address, to ``[..., N]``."""
    *leading, in_features = states.shape
    result = states.new_empty(*leading, out_features)
    rows = functional.pad(states, (0, 1)) if in_features % 2 else states.contiguous()
    native.call(
        "few_rows",
        "multiply",
        _ARGUMENTS,
        rows.data_ptr(),
        weight,
        0 if bias is None else bias.data_ptr(),
        result.data_ptr(),
        states.numel() // in_features,
        (in_features + 1) // 2,
        _filled(in_features, _STORED_INPUTS) // 2,
        out_features,
        chunk // 2,
    )
    return result


def pack(
    rows: int, weight: int, bias: int, result: int, num_rows: int, in_features: int, out_features: int, chunk: int
) -> bytes:
    """Return the structure of `multiply`, for contiguous rows of an even number of inputs, by their addresses."""
    stored = _filled(in_features, _STORED_INPUTS) // 2
    sizes = num_rows, in_features // 2, stored, out_features, chunk // 2
    return _ARGUMENTS.pack(rows, weight, bias, result, *sizes, *native.team())


def _filled(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple

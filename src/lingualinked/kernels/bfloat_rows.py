"""A product of few rows with a bfloat16 weight as torch stores it, at the speed at which memory gives the weight.

Knows the orders in which oneDNN sums with AVX-512 but without its BF16 instructions; not whether torch sums so here: who calls
compares. `bfloat_rows.c` has the orders.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from fractions import Fraction

import torch
from torch import Tensor

from lingualinked.kernels import native

MAX_ROWS = 16

_NEEDED_FLAGS = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_ARGUMENTS = struct.Struct("@3P5l" + native.TEAM)  # `struct product` of bfloat_rows.c
_WHOLE, _CHUNK = 384, 768  # inputs that oneDNN adds up in one piece, and in each of several; fewer than two are halved


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return native.is_available("bfloat_rows", _NEEDED_FLAGS)


def accepts(num_rows: int, in_features: int, out_features: int) -> bool:
    """Say whether the kernel multiplies so many rows: chunks have to begin with a pair, and threads to have equal shares."""
    has_equal_shares = num_rows == 1 or not num_rows * out_features % torch.get_num_threads()
    return num_rows <= MAX_ROWS and has_equal_shares and not in_features % 2 and not _chunk(in_features) % 2


def multiply(rows: Tensor, weight: int, bias: Tensor | None, out_features: int) -> Tensor:
    """Multiply up to `MAX_ROWS` rows ``[M, K]`` with the weight ``[N, K]`` at an address, to ``[M, N]``."""
    inputs, num_together, places, back = rows.float(), *_arrange(len(rows), torch.get_num_threads())
    if places is not None:
        inputs = inputs[places]
    (num_rows, in_features), result = rows.shape, inputs.new_empty(len(rows), out_features)
    native.call(
        "bfloat_rows",
        "multiply",
        _ARGUMENTS,
        inputs.data_ptr(),
        weight,
        result.data_ptr(),
        num_rows,
        num_together,
        in_features,
        out_features,
        _chunk(in_features),
    )
    if back is not None:
        result = result[back]
    return (result if bias is None else result.add_(bias)).to(rows.dtype)


@functools.cache
def _arrange(num_rows: int, num_threads: int) -> tuple[int, Tensor | None, Tensor | None]:
    """Return how many rows are summed as several rows, and places of rows that put them first, and back.

    Outputs are shared out among threads in equal shares, one row after the other: a row that two threads share is
    computed by itself, and so is the only whole row of a thread.
    """
    ends = [Fraction(num_rows * thread, num_threads) for thread in range(num_threads + 1)]
    alone = {math.floor(end) for end in ends if end.denominator > 1}
    for start, end in itertools.pairwise(ends):
        whole = range(math.ceil(start), math.floor(end))
        alone.update(whole if len(whole) == 1 else ())
    places = torch.tensor(sorted(range(num_rows), key=lambda row: row in alone))
    if 0 < len(alone) < num_rows:
        return num_rows - len(alone), places, places.argsort()
    return num_rows - len(alone), None, None


def _chunk(in_features: int) -> int:
    if in_features <= _WHOLE:
        return in_features
    return (in_features + 1) // 2 if in_features < 2 * _CHUNK else _CHUNK

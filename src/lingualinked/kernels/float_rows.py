"""A product of few rows with a float32 weight as torch stores it, at the speed at which memory gives the weight.

Knows the orders in which MKL sums on AMD's processors; not whether torch sums so here: who calls compares.
`float_rows.c` has the orders.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from torch import Tensor

from lingualinked.kernels import native

MAX_ROWS = 16

_NEEDED_FLAGS = frozenset({"avx", "avx2", "fma"})
_REGISTER_ROWS = 8
_LANES = 4  # inputs that are added up side by side, and outputs that are computed at once: MKL sums others otherwise
_ALIGNMENT_BYTES = 16  # from another address, MKL adds the first inputs one by one
_CHUNK = 192  # inputs whose products MKL adds up before it adds them to the others; fewer than two chunks are halved


class Order(NamedTuple):
    """An order of summation: a name of float_rows.c, and from which row on lanes are added up in its place."""

    kind: int
    first_lane_row: int = 0


_LANES_AFTER_FOUR, _LANES_ONLY, _CHUNKS = range(3)
_ARGUMENTS = struct.Struct("@5P5li" + native.TEAM)  # `struct product` of float_rows.c


def is_available() -> bool:
    """Say whether this processor runs the kernel, and it was compiled."""
    return native.is_available("float_rows", _NEEDED_FLAGS)


def known_orders(num_rows: int) -> tuple[Order, ...]:
    """Return the orders in which MKL sums so many rows: with one thread, or where it shares out rows among several."""
    if num_rows == 1:
        return (Order(_LANES_AFTER_FOUR),)
    if num_rows < _LANES:
        return (Order(_LANES_ONLY),)
    whole = num_rows // _LANES * _LANES  # the remaining rows are another thread's
    return tuple(Order(_CHUNKS, first) for first in dict.fromkeys((num_rows, whole)))


def accepts(rows: Tensor, weight: Tensor) -> bool:
    """Say whether the kernel multiplies these rows with this weight: as they lie, MKL sums in a known order."""
    return (
        weight.is_contiguous()
        and all(size % _LANES == 0 for size in weight.shape)
        and rows.data_ptr() % _ALIGNMENT_BYTES == weight.data_ptr() % _ALIGNMENT_BYTES == 0
    )


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, order: Order) -> Tensor:
    """Multiply up to `MAX_ROWS` contiguous rows ``[M, K]`` with a contiguous weight ``[N, K]``, to ``[M, N]``."""
    (num_rows, in_features), out_features = rows.shape, len(weight)
    result = rows.new_empty(num_rows, out_features)
    columns = order.first_lane_row and -(-order.first_lane_row // _REGISTER_ROWS) * _REGISTER_ROWS
    transposed = rows.new_empty(in_features * columns)
    native.call(
        "float_rows",
        "multiply",
        _ARGUMENTS,
        rows.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        result.data_ptr(),
        transposed.data_ptr(),
        num_rows,
        in_features,
        out_features,
        -(-in_features // 2) if _CHUNK < in_features < 2 * _CHUNK else _CHUNK,
        *reversed(order),
    )
    return result

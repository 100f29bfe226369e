"""Products in float32, float16 or bfloat16 summed in any order that one can think of, slowly: right orders and wrong ones.

Knows torch alone; nothing of lingualinked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How a product is summed, and what else may be done wrongly.

    Parameters
    ----------
    lanes : int
        Sums between which the products go round.
    pairs : {"", "odd first", "even first"}
        Whether two neighbours go to the same lane, and which one first.
    halves : {"far", "near", "far once", "in order", "backwards"}
        How lanes are added: each to the one half of all lanes away, to its neighbour, first the one and then the other, or
        one by one from either end.
    fused : bool
        Add each product with one rounding; otherwise it is rounded before.
    first : int
        Products at the beginning that are added up one by one, and then begin a lane.
    first_lane : int
        The lane that they begin.
    first_backwards : bool
        Add them from the last one on.
    rest : int
        The products beyond a multiple of it are summed apart, in `rest_lanes` lanes, and added in the end; 0 for none.
    rest_lanes : int
        Lanes of the rest.
    chunk : int
        Products that are added up before they are added to the others; 0 for all.
    chunks : {"in order", "backwards", "tree", "kept"}
        How the sums of chunks are added; "kept" goes on adding to the sum of the chunks before.
    backwards : bool
        Add products from the last one on.
    bias : {"last", "first", "rounded"}
        Where the bias is added: to the sum, before the first chunk's sum, or to the rounded sum.
    rounding : {"even", "truncated", "away"}
        How a sum in float32 becomes float16.
    rounded_lanes : bool
        Round lanes to bfloat16 before they are added.
    swapped : tuple of int, optional
        Two outputs that change places.
    """

    lanes: int = 1
    pairs: str = ""
    halves: str = "far"
    fused: bool = True
    first: int = 0
    first_lane: int = 0
    first_backwards: bool = False
    rest: int = 0
    rest_lanes: int = 8
    chunk: int = 0
    chunks: str = "in order"
    backwards: bool = False
    bias: str = "last"
    rounding: str = "even"
    rounded_lanes: bool = False
    swapped: tuple[int, int] | None = None


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, order: Order) -> Tensor:
    """Multiply rows ``[M, K]`` with a weight ``[N, K]`` in an order."""
    if rows.dtype is not torch.float32:
        order = replace(order, fused=False)  # products are exact in float32, so that it is the same, and quicker
    left, right = rows.float().T[:, :, None], weight.float().T[:, None, :]  # [K, M, 1] and [K, 1, N]
    if order.backwards:
        left, right = left.flip(0), right.flip(0)
    if order.pairs == "odd first":
        places = torch.arange(len(left)) ^ 1  # of an even number of inputs
        left, right = left[places], right[places]
    whole = len(left) // order.rest * order.rest if order.rest else len(left)
    start = torch.zeros(len(rows), len(weight))
    if bias is not None and order.bias == "first":
        start = start + bias.float()
    total = _sum_chunks(left[:whole], right[:whole], order, start)
    if order.rest:
        apart = replace(order, lanes=order.rest_lanes, chunk=0)
        total = total + _sum(left[whole:], right[whole:], apart, torch.zeros_like(total))
    if bias is not None and order.bias == "last":
        total = total + bias.float()
    result = _round(total, order.rounding, rows.dtype)
    if bias is not None and order.bias == "rounded":
        result = result + bias
    if order.swapped is not None:
        first, second = order.swapped
        result[:, [first, second]] = result[:, [second, first]]
    return result


def _sum_chunks(left: Tensor, right: Tensor, order: Order, start: Tensor) -> Tensor:
    size = order.chunk or max(1, len(left))
    chunks = list(zip(left.split(size), right.split(size), strict=True))
    if order.chunks == "kept":
        total = torch.zeros_like(start)
        for chunk in chunks:
            total = _sum(*chunk, order, total)
        return start + total
    sums = [_sum(*chunk, order, torch.zeros_like(start)) for chunk in chunks]
    if order.chunks == "tree":
        while len(sums) > 1:
            sums = [sum(sums[at : at + 2][1:], sums[at]) for at in range(0, len(sums), 2)]
    for each in sums[::-1] if order.chunks == "backwards" else sums:
        start = start + each
    return start


def _sum(left: Tensor, right: Tensor, order: Order, start: Tensor) -> Tensor:
    lanes = [start, *(torch.zeros_like(start) for _ in range(order.lanes - 1))]
    beginning = [left[at] * right[at] for at in range(min(order.first, len(left)))]
    if beginning:
        beginning = beginning[::-1] if order.first_backwards else beginning
        lanes[order.first_lane] = sum(beginning[1:], beginning[0])
    for at in range(len(beginning), len(left)):
        lane = (at // 2 if order.pairs else at) % order.lanes
        if order.fused:
            lanes[lane] = fused_multiply_add(left[at], right[at], lanes[lane])
        else:
            lanes[lane] = lanes[lane] + left[at] * right[at]
    if order.rounded_lanes:
        lanes = [lane.bfloat16().float() for lane in lanes]
    return _add_lanes(lanes, order.halves)


def _add_lanes(lanes: list[Tensor], halves: str) -> Tensor:
    if halves in ("in order", "backwards"):
        lanes = lanes[::-1] if halves == "backwards" else lanes
        return sum(lanes[1:], lanes[0])
    while len(lanes) > 1:
        half = len(lanes) // 2
        if halves == "near":
            lanes = [first + second for first, second in zip(lanes[::2], lanes[1::2], strict=True)]
        else:
            lanes = [first + second for first, second in zip(lanes[:half], lanes[half:], strict=True)]
        halves = "near" if halves == "far once" else halves
    return lanes[0]


def fused_multiply_add(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """Return ``left * right + total`` of float32, rounded once."""
    product, wide = left.double() * right.double(), total.double()  # exact
    result = product + wide
    back = result - product
    error = (product - (result - back)) + (wide - back)  # of the sum in float64
    bits = result.contiguous().view(torch.int64)
    is_even = (bits & 1) == 0  # an odd last bit says that there is more: float32 rounds by it, as by all that was lost
    step = torch.where((error > 0) == (result > 0), 1, -1)
    return torch.where((error != 0) & is_even, bits + step, bits).view(torch.float64).float()


def _round(values: Tensor, rounding: str, dtype: torch.dtype) -> Tensor:
    result = values.to(dtype)
    if rounding == "even" or dtype is torch.float32:
        return result
    if rounding == "truncated":
        beyond = result.float().abs() > values.abs()
        return torch.where(beyond, torch.nextafter(result, torch.zeros_like(result)), result)
    farther = torch.nextafter(result, torch.where(values > 0, torch.inf, -torch.inf).to(dtype))
    is_tie = (values - result.float() == (farther.float() - values)) & (values != result.float())
    return torch.where(is_tie, farther, result)

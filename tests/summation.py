"""Products of few rows summed in any order that one can think of, slowly, in float32: right orders and wrong ones.

Knows float32 and bfloat16 alone; nothing of lingualinked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LANES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How a product is summed, and what else may be done wrongly.

    Parameters
    ----------
    chunk : int
        Inputs whose products are added up before they are added to the others; 0 for all.
    pairs : {"odd first", "even first", "together", "one by one", "backwards"}
        How the products of a chunk are added: of each two neighbours the second first, the first first, their sum at
        once, all in order, or in order from the end.
    lanes : int
        Partial sums of a chunk, between which its pairs go round; they are added as a tree.
    chunks : {"in order", "backwards", "tree", "kept"}
        How the sums of chunks are added; "kept" goes on adding to the sum of the chunks before.
    bias : {"last", "first", "rounded"}
        Where the bias is added: to the sum, before everything else, or to the rounded sum.
    rounding : {"even", "truncated", "away", "up", "twice"}
        How a sum becomes bfloat16: ties to even, to zero, ties away from zero, ties up, by way of float16's mantissa.
    rest : int
        Inputs at the end that are summed by themselves.
    merged : int
        Inputs beyond the last full chunk that still belong to it.
    swapped : tuple of int, optional
        Two outputs that change places.
    rounded_chunks : bool
        Round the sums of chunks to bfloat16.
    """

    chunk: int = 512
    pairs: str = "odd first"
    lanes: int = 1
    chunks: str = "in order"
    bias: str = "last"
    rounding: str = "even"
    rest: int = 0
    merged: int = 0
    swapped: tuple[int, int] | None = None
    rounded_chunks: bool = False


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, order: Order) -> Tensor:
    """Multiply rows ``[M, K]`` with a weight ``[N, K]`` in an order."""
    if order.rest and rows.shape[1] > order.rest:
        at = rows.shape[1] - order.rest
        whole = replace(order, rest=0)
        total = _sum(_products(rows[:, :at], weight[:, :at]), whole) + _sum(
            _products(rows[:, at:], weight[:, at:]), whole
        )
    else:
        products = _products(rows, weight)
        if bias is not None and order.bias == "first":
            products = torch.cat([torch.zeros_like(products[:1]), bias.float().expand(products[:1].shape), products])
        total = _sum(products, order)
    if bias is not None and order.bias == "last":
        total = total + bias.float()
    result = _round(total, order.rounding)
    if bias is not None and order.bias == "rounded":
        result = result + bias
    if order.swapped is not None and max(order.swapped) < result.shape[1]:
        first, second = order.swapped
        result[:, [first, second]] = result[:, [second, first]]
    return result


def _products(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the products by input, ``[K, M, N]``: exact in float32 unless they underflow."""
    return rows.float().T[:, :, None] * weight.float().T[:, None, :]


def _sum(products: Tensor, order: Order) -> Tensor:
    size = order.chunk or len(products)
    chunks = list(products.split(size))
    if len(chunks) > 1 and len(chunks[-1]) <= order.merged:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    if order.chunks == "kept":
        total = torch.zeros_like(products[0])
        for chunk in chunks:
            total = _sum_chunk(chunk, order, total)
        return total
    full = [chunk for chunk in chunks if len(chunk) == size]
    sums = list(_sum_chunk(torch.stack(full, dim=1), order)) if full else []  # all at once: steps are slow
    sums += [_sum_chunk(chunk, order) for chunk in chunks[len(full) :]]
    if order.rounded_chunks:
        sums = [each.bfloat16().float() for each in sums]
    if order.chunks == "tree":
        return _add_tree(sums)
    total = sums[-1] if order.chunks == "backwards" else sums[0]
    for each in sums[-2::-1] if order.chunks == "backwards" else sums[1:]:
        total = total + each
    return total


def _sum_chunk(products: Tensor, order: Order, start: Tensor | None = None) -> Tensor:
    if len(products) % 2:
        products = torch.cat([products, torch.zeros_like(products[:1])])
    if order.pairs == "backwards":
        products = products.flip(0)
    even, odd = products[0::2].unbind(), products[1::2].unbind()
    sums = [torch.zeros_like(even[0]) if start is None else start.clone()]
    sums += [torch.zeros_like(even[0]) for _ in range(order.lanes - 1)]
    for index, (first, second) in enumerate(zip(even, odd, strict=True)):
        total = sums[index % order.lanes]
        if order.pairs == "together":
            total += first + second
        elif order.pairs in ("odd first", "backwards"):
            total += second
            total += first
        else:
            total += first
            total += second
    return _add_tree(sums)


def _add_tree(sums: list[Tensor]) -> Tensor:
    while len(sums) > 1:
        sums = [sum(sums[at : at + 2][1:], sums[at]) for at in range(0, len(sums), 2)]
    return sums[0]


def _round(values: Tensor, rounding: str) -> Tensor:
    if rounding == "even":
        return values.bfloat16()
    bits = values.contiguous().view(torch.int32)
    if rounding == "away":
        bits = bits + 0x8000
    elif rounding == "up":
        bits = bits + (0x7FFF + (values > 0).int())
    elif rounding == "twice":
        return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32).bfloat16()
    return (bits & ~0xFFFF).view(torch.float32).bfloat16()

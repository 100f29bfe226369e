"""Products in which any other order of summation shows, with which kernels are compared with torch.

Knows no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_OUTPUTS = 64
_NUM_DISTINCT = 64  # rows and outputs; the others repeat them
_NUM_NEIGHBOURS = 8
_TINY = 2.0**-130  # not a normal value: some instructions take it for zero
_TINY_HALF = 2.0**-20  # nor is this one in float16


class Product(NamedTuple):
    """Rows ``[M, in features]``, weight ``[out features, in features]`` and bias ``[out features]`` of a linear layer."""

    rows: Tensor
    weight: Tensor
    bias: Tensor | None


MakeProduct = Callable[[int, int, int, bool, torch.Generator, torch.dtype], Product]
"""From M, in features, out features, whether there is a bias, random numbers and a dtype."""


def cancelling_product(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
) -> Product:
    """Make a product in which any other order of summation changes nearly every output.

    Each term, including the bias, is cancelled by an equal one at a random place, so that only rounding errors remain.
    The terms have many magnitudes, so that there are such errors.
    """
    num_pairs = (in_features - has_bias) // 2
    back = torch.randperm(num_pairs, generator=generator)
    magnitudes = 2.0 ** torch.randint(-6, 7, (num_pairs,), generator=generator)
    inputs = magnitudes * torch.randn((min(num_rows, _NUM_DISTINCT), num_pairs), generator=generator)
    weights = torch.randn((min(out_features, _NUM_DISTINCT), num_pairs), generator=generator)
    bias = torch.randn(len(weights), generator=generator).to(dtype) if has_bias else None
    rest = torch.full((1, in_features - has_bias - 2 * num_pairs), 2.0**-14)
    rows = [inputs, -inputs[:, back], rest.expand(len(inputs), -1)]
    columns = [weights, weights[:, back], rest.expand(len(weights), -1)]
    if bias is not None:
        rows.append(torch.ones(len(inputs), 1))
        columns.append(-bias[:, None].float())
    places = torch.randperm(in_features, generator=generator)
    weight = torch.cat(columns, dim=1)[:, places]
    return _repeat_distinct(num_rows, out_features, torch.cat(rows, dim=1)[:, places], weight, bias, dtype)


def absorbing_product(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
) -> Product:
    """Make a product in which a large term absorbs all that is added before its opposite cancels it.

    So an output is the sum of what comes after the two. They lie near the end, near the beginning, or anywhere: a
    cancelling product says little about a short last chunk.
    """
    num_distinct = min(out_features, _NUM_DISTINCT)
    outputs = torch.arange(num_distinct)
    large, opposite = torch.randint(in_features, (2, num_distinct), generator=generator)
    opposite[0::3] = (-1 - outputs[0::3] // 3 % 8) % in_features
    large[1::3], opposite[1::3] = 0, (1 + outputs[1::3] // 3) % in_features
    rows = 2.0 ** torch.randint(-3, 4, (min(num_rows, _NUM_DISTINCT), 1), generator=generator)
    absorbing, others = (2.0**15, 2.0**-11) if dtype is torch.float16 else (2.0**40, 1.0)
    weight = others * torch.randn((num_distinct, in_features), generator=generator)
    weight[outputs, large] = absorbing
    weight[outputs, opposite] = -absorbing
    bias = others * torch.randn(num_distinct, generator=generator) if has_bias else None
    return _repeat_distinct(num_rows, out_features, rows.expand(-1, in_features), weight, bias, dtype)


def sparse_product(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Product:
    """Make a product in which an output is the sum of a few terms, which are neighbours, so that each rounding shows.

    They lie at the beginning, at the end, or anywhere; all other weights are zero. What is rounded otherwise at a single
    place is lost among the many roundings of a cancelling product.
    """
    num_distinct, num_terms = min(out_features, _NUM_DISTINCT), min(in_features, _NUM_NEIGHBOURS)
    first = torch.randint(in_features - num_terms + 1, (num_distinct, 1), generator=generator)
    first[0::3], first[1::3] = 0, in_features - num_terms
    rows = torch.randn((min(num_rows, _NUM_DISTINCT), in_features), generator=generator)
    terms = torch.randn((num_distinct, num_terms), generator=generator)
    weight = torch.zeros(num_distinct, in_features).scatter_(1, first + torch.arange(num_terms), terms)
    bias = torch.randn(num_distinct, generator=generator) if has_bias else None
    return _repeat_distinct(num_rows, out_features, rows, weight, bias, dtype)


def tied_product(
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
) -> Product:
    """Make a product of small numbers that is exact in any order, and then rounded once, from halfway between two values.

    Results are odd, and near 384 or -384: from 256 to 512, bfloat16 has the even numbers; in float16 they are near 3,072. One
    term is far smaller, or zero: results a little above or below halfway show who rounds twice. Some outputs have weights
    that are not normal values.
    """
    largest = max(1, round(10 / in_features**0.25))
    rows, weight = (
        torch.randint(-largest, largest + 1, (min(number, _NUM_DISTINCT), in_features), generator=generator).float()
        for number in (num_rows, out_features)
    )
    rows *= 2
    is_half = dtype is torch.float16
    for place, (row, column) in enumerate(((48, 64) if is_half else (16, 24), (1, 1), (2**-6, 2**-6))):
        rows[:, place : place + 1] = row
        weight[:, place : place + 1] = column
    weight[:, 2:3] *= torch.randint(-1, 2, (len(weight), 1), generator=generator)
    weight *= 2 * torch.randint(0, 2, (len(weight), 1), generator=generator) - 1
    bias = 2 * torch.randint(-32, 33, (len(weight),), generator=generator).float() if has_bias else None
    tiny = _TINY_HALF if is_half else _TINY
    weight[5::8] *= tiny
    if bias is not None:
        bias[5::8] *= tiny
    return _repeat_distinct(num_rows, out_features, rows, weight, bias, dtype)


def _repeat_distinct(
    num_rows: int,
    out_features: int,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Product:
    outputs = torch.arange(out_features)
    outputs = (outputs + outputs // BLOCK_OUTPUTS) % len(weight)  # no two blocks are equal: an exchange is seen
    return Product(
        rows.to(dtype)[torch.arange(num_rows) % len(rows)],
        weight.to(dtype)[outputs],
        None if bias is None else bias.to(dtype)[outputs],
    )

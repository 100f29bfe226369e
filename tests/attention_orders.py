"""Attention of few new tokens summed in any order that one can think of, slowly, in float32: right orders and wrong ones.

Knows bfloat16 and float16; nothing of lingualinked.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

VECTOR = 16
MANY_TOKENS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How attention is summed, and what else may be done wrongly.

    Parameters
    ----------
    block : int
        Tokens whose scores become weights together.
    lanes, few_lanes, rest_lanes : int
        Partial sums of a score, between which dimensions go round: in general, of fewer than 12 tokens, and of tokens that
        are left over from fours of these or of several lanes.
    added : {"halves", "neighbours", "in order", "backwards"}
        Sums of lanes, of four tokens and of a vector's elements: the first half to the second, each to the next one, one by
        one, or from the last one on.
    score_added, four_added, vector_added : str, optional
        The same of one of these alone.
    backwards : bool
        Sum scores from the last dimension on.
    chunk, score_chunk : int
        Terms that are added up before they are added to the others, of values and of scores; 0 for all.
    scaled : {"scores", "query", "differences"}
        What the scale multiplies: scores, the query before, which is rounded, or scores less the highest one.
    mask_added : {"fused", "rounded", "before"}
        Whether a scaled score is rounded before what a mask says is added, or not scaled before.
    lowest : float
        What a mask adds to the scores of tokens that do not count.
    highest : {"so far", "of all"}
        Which score is subtracted from a block's scores.
    exponential, rest_exponential : {"approximate", "exact", "expf"}
        Of what fills vectors, and of what does not; in double precision, or by the C library's function.
    sums : int
        Vectors to which exponentials are added in turn.
    rest_sum : {"last", "first", "apart"}
        When exponentials that do not fill a vector are added: after the others, before, or added up by themselves.
    weights : {"rounded", "kept", "truncated", "rounded first"}
        How exponentials become weights: rounded once they are added up, not at all, to zero, or before they are added up.
    shrink : {"fused", "rounded", "approximate", "never"}
        How the sum before shrinks.
    values : {"fours", "one by one"}
        How values are added: of four tokens first, or of each token.
    rest_values : {"backwards", "in order"}
        How tokens that are left over from fours are added.
    is_kept : bool
        Add values to the result so far, not to a sum of their own that is added at last.
    is_fused : bool
        Add products one by one without rounding them first.
    apart : {"never", "aligned", "always", "first four"}
        Whether the first dimensions, which do not lie on 16 bytes in a buffer, add the second four of each eight tokens by
        themselves; or all dimensions; or the first four.
    division : {"reciprocal", "quotient"}
        Whether the result is multiplied or divided.
    rounding : {"even", "truncated", "away"}
        How the result becomes the dtype.
    """

    block: int = 512
    lanes: int = 4
    few_lanes: int = 4
    rest_lanes: int = 4
    added: str = "halves"
    score_added: str | None = None
    four_added: str | None = None
    vector_added: str | None = None
    backwards: bool = False
    chunk: int = 0
    score_chunk: int = 0
    scaled: str = "scores"
    mask_added: str = "fused"
    lowest: float = -math.inf
    highest: str = "so far"
    exponential: str = "approximate"
    rest_exponential: str = "exact"
    sums: int = 2
    rest_sum: str = "last"
    weights: str = "rounded"
    shrink: str = "fused"
    values: str = "fours"
    rest_values: str = "backwards"
    is_kept: bool = True
    is_fused: bool = False
    apart: str = "never"
    division: str = "reciprocal"
    rounding: str = "even"


def attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None, order: Order
) -> tuple[Tensor, Tensor]:
    """Return attention ``[rows, products, queries, dim]`` and the logarithms of the sums of exponentials.

    The query has the same shape, with the queries that are multiplied at once; keys and values are ``[rows, products,
    tokens, dim]``.
    """
    dtype, num_queries, num_tokens = query.dtype, query.shape[2], keys.shape[2]
    parts = [slice(at, min(at + order.block, num_tokens)) for at in range(0, num_tokens, order.block)]
    blocks = [
        _scores(query, keys[:, :, part], scale, None if mask is None else mask[..., part], order) for part in parts
    ]
    first_dims = -num_queries * (min(num_tokens, order.block) + 2) % 4
    highest = torch.full_like(blocks[0][..., :1], -math.inf)
    if order.highest == "of all":
        highest = torch.cat(blocks, dim=-1).amax(-1, keepdim=True)
    total_sum, total = torch.zeros_like(highest), torch.zeros(query.shape)
    for part, scores in zip(parts, blocks, strict=True):
        before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
        is_empty = highest == -math.inf
        added, weights = _weigh(torch.where(is_empty, -math.inf, scores - highest), scale, dtype, order)
        exponential = approximate_exponential if order.shrink == "approximate" else exact_exponential
        shrink = torch.where(is_empty, 1, exponential(before - highest))
        total_sum = shrink * total_sum + added if order.shrink == "rounded" else _fused(shrink, total_sum, added)
        if part.start and order.shrink != "never":
            total = total * shrink
        total = _add_values(total, weights, values[:, :, part].float(), first_dims, order)
    total_sum = torch.where(total_sum == 0, 1, total_sum)
    result = total / total_sum if order.division == "quotient" else total * (1 / total_sum)
    logsums = torch.where(highest == -math.inf, 0, highest) + total_sum.clone().apply_(_c_function("logf"))
    return _round(result, dtype, order.rounding), logsums.squeeze(-1)


def _scores(query: Tensor, keys: Tensor, scale: float, mask: Tensor | None, order: Order) -> Tensor:
    count = keys.shape[2]
    scaled = query * scale if order.scaled == "query" else query
    products = scaled[:, :, :, None].float() * keys[:, :, None].float()
    if order.backwards:
        products = products.flip(-1)
    lanes = order.lanes if count >= MANY_TOKENS else order.few_lanes
    scores = _sum_lanes(products, lanes, order)
    rest = count % 4
    if lanes > 1 and rest and not (query.dtype is torch.bfloat16 and count == 1):
        scores = torch.cat([scores[..., :-rest], _sum_lanes(products[..., -rest:, :], order.rest_lanes, order)], dim=-1)
    addends = 0 if mask is None else mask.float()
    if mask is not None and mask.dtype is torch.bool:
        addends = torch.where(mask, 0.0, order.lowest)
    if order.mask_added == "before":
        scores, addends = scores + addends, 0
    if order.scaled == "scores":
        scale = float(torch.tensor(scale))
        scores = scores * scale + addends if order.mask_added == "rounded" else _fused(scores, scale, addends)
    return scores


def _sum_lanes(products: Tensor, lanes: int, order: Order) -> Tensor:
    """Sum products ``[.., dim]`` over dimensions."""
    chunk = _chunk(products.shape[-1], order.score_chunk if lanes == 1 else 0)
    total: Tensor | None = None
    for part in products.split(chunk, dim=-1):
        sums = torch.zeros(*part.shape[:-1], lanes)
        for terms in part.split(lanes, dim=-1):
            sums = sums + terms
        if lanes > 4:
            sums = (
                sums[..., :4] + sums[..., 4:8]
                if lanes == 8
                else (sums[..., :4] + sums[..., 4:8]) + (sums[..., 8:12] + sums[..., 12:])
            )
        one = _add(sums.unbind(-1), order.score_added or order.added)
        total = one if total is None else total + one
    assert total is not None
    return total


def _chunk(size: int, chunk: int) -> int:
    if not chunk or size <= chunk:
        return size
    return size // 2 if size < 2 * chunk else chunk


def _add(terms: Iterable[Tensor], how: str) -> Tensor:
    left = list(terms)
    if how in ("in order", "backwards"):
        left = left[::-1] if how == "backwards" else left
        total = left[0]
        for term in left[1:]:
            total = total + term
        return total
    while len(left) > 1:
        half = len(left) // 2
        left = (
            [left[i] + left[half + i] for i in range(half)]
            if how == "halves"
            else [left[2 * i] + left[2 * i + 1] for i in range(half)]
        )
    return left[0]


def _weigh(differences: Tensor, scale: float, dtype: torch.dtype, order: Order) -> tuple[Tensor, Tensor]:
    """Return the sum of exponentials, and weights."""
    if order.scaled == "differences":
        differences = differences * scale
    whole = differences.shape[-1] // VECTOR * VECTOR
    functions = {
        "approximate": approximate_exponential,
        "exact": exact_exponential,
        "expf": lambda values: values.clone().apply_(_c_function("expf")),
    }
    exponentials = functions[order.exponential](differences[..., :whole])
    rest = functions[order.rest_exponential](differences[..., whole:])
    if order.weights == "rounded first":
        exponentials, rest = (each.to(dtype).float() for each in (exponentials, rest))
    sums = [torch.zeros(*differences.shape[:-1], VECTOR) for _ in range(order.sums)]
    for index, vector in enumerate(exponentials.split(VECTOR, dim=-1) if whole else ()):
        sums[index % order.sums] = sums[index % order.sums] + vector
    total = _add(_add(sums, "halves").unbind(-1), order.vector_added or order.added)
    ones = list(rest.unbind(-1))
    if order.rest_sum == "first":
        total = _add([*ones, total], "in order")
    elif order.rest_sum == "apart" and ones:
        total = total + _add(ones, "in order")
    else:
        total = _add([total, *ones], "in order")
    weights = torch.cat([exponentials, rest], dim=-1)
    if order.weights != "kept":
        weights = _round(weights, dtype, "truncated" if order.weights == "truncated" else "even").float()
    return total[..., None], weights


def _add_values(total: Tensor, weights: Tensor, values: Tensor, first_dims: int, order: Order) -> Tensor:
    """Add weighted values ``[.., tokens, dim]`` to a total ``[.., queries, dim]``."""
    if order.is_fused:
        weights, values = weights.double(), values.double()
    terms = [weights[..., token, None] * values[:, :, None, token] for token in range(values.shape[2])]
    size = _chunk(len(terms), order.chunk)
    for start in range(0, len(terms), size):
        part = terms[start : start + size]
        result = total if order.is_kept else torch.zeros_like(total)
        if order.values == "fours":
            whole = len(part) // 4 * 4
            for at in range(0, whole, 4):
                result = result + _add(part[at : at + 4], order.four_added or order.added)
            for term in part[whole:][:: -1 if order.rest_values == "backwards" else 1]:
                result = result + term
        else:
            dims = torch.arange(total.shape[-1])
            limits = {"never": 0, "aligned": first_dims, "always": len(dims), "first four": 4}
            result = _add_one_by_one(result, part, dims < limits[order.apart])
        total = result if order.is_kept else total + result
    return total


def _add_one_by_one(result: Tensor, terms: list[Tensor], are_apart: Tensor) -> Tensor:
    whole = len(terms) // 8 * 8
    for at in range(0, whole, 8):
        result = _add_terms(result, terms[at : at + 4])
        second = terms[at + 4 : at + 8]
        result = torch.where(are_apart, result + _add(second, "in order").float(), _add_terms(result, second))
    return _add_terms(result, terms[whole:])


def _add_terms(result: Tensor, terms: Iterable[Tensor]) -> Tensor:
    for term in terms:
        result = (result + term).float()
    return result


def approximate_exponential(values: Tensor) -> Tensor:
    """Return exponentials as torch approximates them in vectors: 2^x less a cubic of the fraction, as the exponent's bits."""
    power = values * float.fromhex("0x1.715476p+0")
    fraction = power - power.floor()
    cubic = _fused(fraction, -0.079204240219773236, -0.22433836478672356)
    for coefficient in (0.30354260500649682, 0.00010703434948458272):
        cubic = _fused(fraction, cubic, coefficient)
    bits = _fused(torch.tensor(2.0**23), power - cubic, 2.0**23 * 127)
    bits = torch.where(values >= float.fromhex("-0x1.5d58ap+6"), bits, 0)
    return bits.int().view(torch.float32)


def exact_exponential(values: Tensor) -> Tensor:
    """Return exponentials, correctly rounded but in one of a billion cases."""
    return values.double().exp().float()


def _c_function(name: str) -> Callable[[float], float]:
    """Return a function of the C library, which is not always correctly rounded."""
    function = getattr(ctypes.CDLL("libm.so.6"), name)
    function.argtypes, function.restype = (ctypes.c_float,), ctypes.c_float
    return function


def _fused(first: Tensor, second: Tensor | float, third: Tensor | float) -> Tensor:
    """Multiply and add with one rounding, or two in one of a billion cases; constants are float32."""
    a, b, c = (torch.as_tensor(each, dtype=torch.float32).double() for each in (first, second, third))
    return (a * b + c).float()


def _round(values: Tensor, dtype: torch.dtype, rounding: str) -> Tensor:
    if rounding == "even":
        return values.to(dtype)
    lost = 16 if dtype is torch.bfloat16 else 13  # bits
    bits = values.contiguous().view(torch.int32)
    if rounding == "away":
        bits = bits + (1 << lost - 1)
    return (bits & -(1 << lost)).view(torch.float32).to(dtype)

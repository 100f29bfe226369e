"""Finds out how torch rounds here: in which order it sums, and whether a row's bits depend on the other rows.

Knows torch's products, attention and elementwise functions; no models. Inputs are made so that any other order of summation
shows (`packed_linear.cancelling_product`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lingualinked.model.packed_linear import cancelling_product
from lingualinked.rounding import Rounding

_NUM_ROWS = 16
_COUNTS = (1, 2, 3, 4, 5, 8)  # rows of the parts whose bits are compared with those of the whole
_NUM_INPUTS, _NUM_OUTPUTS = 2100, 40  # more inputs than the chunks in which products are known to be added up
_NUM_HEADS, _HEAD_SIZE = 1, 64

Batched = Callable[[slice], Tensor]
"""From some of the rows of fixed inputs to their results."""


@functools.cache
def probe_rounding(dtype: torch.dtype, num_threads: int) -> Rounding:  # noqa: ARG001 - results depend on it
    """Find out how this process rounds in a dtype, with the number of threads that torch uses now; in some 10 ms."""
    digest, least = hashlib.sha256(), 1
    with torch.inference_mode():
        for function in _functions(dtype):
            whole = function(slice(0, _NUM_ROWS))
            digest.update(whole.view(torch.uint8).numpy().tobytes())
            digest.update(function(slice(0, 1)).view(torch.uint8).numpy().tobytes())
            least = max(least, _least_independent(function, whole))
    return Rounding(digest.hexdigest()[:16], least if least < _NUM_ROWS else 0)


def _least_independent(function: Batched, whole: Tensor) -> int:
    """Return the least count from which on parts of any tried count have the bits of the whole; all rows if none has."""
    for position in reversed(range(len(_COUNTS))):
        count = _COUNTS[position]
        parts = slice(0, count), slice(_NUM_ROWS - count, _NUM_ROWS)
        if not all(torch.equal(function(part), whole[part]) for part in parts):
            return _COUNTS[position + 1] if position + 1 < len(_COUNTS) else _NUM_ROWS
    return _COUNTS[0]


def _functions(dtype: torch.dtype) -> Iterator[Batched]:
    generator = torch.Generator().manual_seed(0)
    for has_bias in (False, True):
        rows, weight, bias = (
            None if each is None else each.to(dtype)
            for each in cancelling_product(_NUM_ROWS, _NUM_INPUTS, _NUM_OUTPUTS, has_bias, generator)
        )
        assert rows is not None
        assert weight is not None
        yield functools.partial(_linear, rows, weight, bias)
    for num_tokens, num_kv in ((1, 600), (40, 40)):  # decoding; a prompt
        queries, keys, values = (
            torch.randn((_NUM_ROWS, _NUM_HEADS, length, _HEAD_SIZE), generator=generator).to(dtype)
            for length in (num_tokens, num_kv, num_kv)
        )
        yield functools.partial(_attention, queries, keys, values)
        yield functools.partial(_eager_attention, queries, keys, values)
    states = 4 * torch.randn((_NUM_ROWS, 100), generator=generator).to(dtype)
    yield functools.partial(_elementwise, states)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    return functional.linear(rows[part].contiguous(), weight, bias)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, part: slice) -> Tensor:
    return functional.scaled_dot_product_attention(queries[part], keys[part], values[part])


def _eager_attention(queries: Tensor, keys: Tensor, values: Tensor, part: slice) -> Tensor:
    scores = torch.matmul(queries[part], keys[part].transpose(2, 3)) * _HEAD_SIZE**-0.5
    return torch.matmul(functional.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype), values[part])


def _elementwise(states: Tensor, part: slice) -> Tensor:
    normalised = states[part] * torch.rsqrt(states[part].float().pow(2).mean(-1, keepdim=True) + 1e-6).to(states.dtype)
    return functional.silu(normalised) + functional.gelu(normalised) + normalised.cos()

"""Finds out how torch rounds here: in which order it sums, and whether a row's bits depend on the other rows.

Knows torch's products, attention and elementwise functions; no models. Inputs are made so that any other order of summation
shows (`products.cancelling_product`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.exact.products import cancelling_product
from lingualinked.rounding import Rounding

_NUM_ROWS = 32
_NUM_TEXTS = 12  # rows of attention
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16)  # rows of the parts whose bits are compared with those of the whole
VECTOR_BYTES = (
    128  # computed at once at most, in two registers; what is left over at the end is computed by other functions
)
_VECTOR = 32  # elements of float32
_SHAPES = ((2100, 40), (32, 96), (96, 32), (300, 200))  # inputs, one more than are added up in one piece; outputs
_NUM_HEADS, _HEAD_SIZE = 2, 64  # with a single one, torch shares out a single row among threads in another way

Batched = Callable[[slice], Tensor]
"""From some of the rows of fixed inputs to their results."""


@functools.cache
@keep_result(Rounding)
def probe_rounding(
    dtype: torch.dtype,
    num_threads: int,  # noqa: ARG001 - results depend on it
    groups: tuple[int, ...] = (),
) -> Rounding:
    """Find out how this process rounds in a dtype, with the number of threads that torch uses now; in some 50 ms.

    `groups` are the numbers of heads that share keys.
    """
    digest, least = hashlib.sha256(), 1
    with torch.inference_mode():
        for function in _functions(dtype, groups):
            whole = function(slice(None))
            digest.update(whole.view(torch.uint8).numpy().tobytes())
            digest.update(function(slice(0, 1)).view(torch.uint8).numpy().tobytes())
            least = max(least, _least_independent(function, whole))
        digest.update(_left_over(dtype).view(torch.uint8).numpy().tobytes())
    return Rounding(digest.hexdigest()[:16], least if least <= _COUNTS[-3] else 0)  # three counts have to confirm it


def fills_vectors(model: nn.Module, dtype: object) -> bool:
    """Say whether no row of what a model computes in a dtype ends within a vector: then a row's place does not change its bits."""
    assert isinstance(dtype, torch.dtype), "a config may name it"
    sizes = [parameter.shape[-1] for parameter in model.parameters() if parameter.ndim > 1]
    sizes += [module.in_features for module in model.modules() if isinstance(module, PackedLinear)]  # no parameter
    return all(size * dtype.itemsize % VECTOR_BYTES == 0 for size in sizes)


def keeps_rows_apart(model: nn.Module, dtype: object) -> bool:
    """Say whether a model computes each row, in a dtype, with as many others as the batch has, wherever it is in the batch.

    Experts do not: each computes with as many rows as happen to come to it.
    """
    has_experts = any(path.rpartition(".")[2] == "experts" for path, _ in model.named_modules())
    return not has_experts and fills_vectors(model, dtype)


def find_groups(model: nn.Module) -> tuple[int, ...]:
    """Return the numbers of heads that share keys, of a model's layers where some do."""
    groups = {getattr(module, "num_key_value_groups", 1) for module in model.modules()}
    return tuple(sorted(group for group in groups if group > 1))


def _least_independent(function: Batched, whole: Tensor) -> int:
    """Return the least count from which on parts of any tried count have the bits of the whole."""
    least = 1
    for count in _COUNTS:
        for part in (slice(0, count), slice(len(whole) - count, len(whole))):
            if count < len(whole) and not torch.equal(function(part), whole[part]):
                least = count + 1
    return least


def _functions(dtype: torch.dtype, groups: Iterable[int] = ()) -> Iterator[Batched]:
    generator = torch.Generator().manual_seed(0)
    for (num_inputs, num_outputs), has_bias in itertools.product(_SHAPES, (False, True)):
        rows, weight, bias = (
            None if each is None else each.to(dtype)
            for each in cancelling_product(_NUM_ROWS, num_inputs, num_outputs, has_bias, generator)
        )
        assert rows is not None
        assert weight is not None
        yield functools.partial(_linear, rows, weight, bias)
    for num_tokens, num_kv in ((1, 600), (40, 40)):  # decoding; a prompt
        inputs = _cancelling_attention(dtype, num_tokens, num_kv, generator)
        yield functools.partial(_attention, *inputs, None)
        yield functools.partial(_eager_attention, *inputs)
    for group, num_kv in itertools.product(
        groups, (33, 600)
    ):  # decoding of padded rows: heads that share keys are joined
        mask = torch.ones(_NUM_TEXTS, 1, 1, num_kv, dtype=torch.bool)
        yield functools.partial(_attention, *_cancelling_attention(dtype, group, num_kv, generator), mask)
    states = 4 * torch.randn((_NUM_ROWS, 2 * _VECTOR), generator=generator).to(dtype)
    yield functools.partial(_elementwise, states)


def _cancelling_attention(
    dtype: torch.dtype, num_tokens: int, num_kv: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Make attention of which only rounding errors remain, since values with equal weights cancel."""
    queries, keys, values = (
        torch.randn((_NUM_TEXTS, _NUM_HEADS, length, _HEAD_SIZE), generator=generator).to(dtype)
        for length in (num_tokens, num_kv, num_kv)
    )
    half = num_kv // 2
    keys[:, :, half : 2 * half], values[:, :, half : 2 * half] = keys[:, :, :half], -values[:, :, :half]
    values[:, :, 2 * half :] = 0
    return queries, keys, values


def _left_over(dtype: torch.dtype) -> Tensor:
    """Compute what is left over at the end of vectors, for which the system's functions of one number are called."""
    states = torch.linspace(-6, 6, _VECTOR - 1).to(dtype)
    functions = (torch.exp, torch.sin, torch.cos, torch.tanh, torch.erf, functional.silu, functional.gelu)
    return torch.cat([*(function(states) for function in functions), torch.pow(10_000.0, states / 6)])


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    return functional.linear(rows[part].contiguous(), weight, bias)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, part: slice) -> Tensor:
    mask = None if mask is None else mask[part]
    return functional.scaled_dot_product_attention(queries[part], keys[part], values[part], attn_mask=mask)


def _eager_attention(queries: Tensor, keys: Tensor, values: Tensor, part: slice) -> Tensor:
    scores = torch.matmul(queries[part], keys[part].transpose(2, 3)) * _HEAD_SIZE**-0.5
    return torch.matmul(functional.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype), values[part])


def _elementwise(states: Tensor, part: slice) -> Tensor:
    normalised = states[part] * torch.rsqrt(states[part].float().pow(2).mean(-1, keepdim=True) + 1e-6).to(states.dtype)
    return functional.silu(normalised) + functional.gelu(normalised) + normalised.cos()

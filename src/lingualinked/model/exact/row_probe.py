"""Finds out whether the bits of a row depend on how many others there are, on its place, or on the number of threads.

Knows torch's products, attention and elementwise functions; no models. One thread that computes two rows is the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingualinked.model.exact.bits import have_equal_bits
from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.exact.product_probe import MIN_ELEMENTS, PROBED_ELEMENTS
from lingualinked.model.exact.products import BLOCK_OUTPUTS, absorbing_product, cancelling_product
from lingualinked.model.exact.rounding_probe import VECTOR_BYTES
from lingualinked.model.hf_internals.computing import torch_attention
from lingualinked.model.process.torch_settings import one_thread

# Rows of products: few, one more and one less than blocks of kernels have, and prompts.
_COUNTS = (*range(2, 18), 23, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257, 300, 384)
_MANY = (*_COUNTS, 511, 512, 513, 640, 768, 1000, 1024, 1025, 1536)
_NUM_DISTINCT = 64  # rows of the products, which others repeat
_NEW_AND_HELD = ((1, 0), (1, 7), (1, 40), (1, 600), (2, 0), (7, 0), (33, 0), (200, 0), (3, 45), (7, 520), (88, 600))
_SPARES = (0, 1, 3, 14)  # tokens beside those of a text
_LEFT_OVER = 31  # elements that fill no vector


@functools.cache
@keep_result(bool)
def has_free_products(
    dtype: torch.dtype, in_features: int, out_features: int, has_bias: bool, num_threads: int
) -> bool | None:
    """Probe whether any two rows or more of a linear layer have the bits that two of them have."""
    generator = torch.Generator().manual_seed(0)
    makes = ((cancelling_product, PROBED_ELEMENTS // 4, _MANY), (absorbing_product, 2 * MIN_ELEMENTS, _COUNTS))
    with torch.inference_mode():
        try:
            for make, num_elements, counts in makes:
                num_blocks = max(num_threads, num_elements // in_features // BLOCK_OUTPUTS)
                num_outputs = min(out_features, num_blocks * BLOCK_OUTPUTS + out_features % BLOCK_OUTPUTS)
                rows, weight, bias = make(max(counts), in_features, num_outputs, has_bias, generator, dtype)
                with one_thread():
                    pairs = rows[:_NUM_DISTINCT].split(2)
                    two = torch.cat([functional.linear(pair.contiguous(), weight, bias) for pair in pairs])
                expected = two.repeat(-(-max(counts) // _NUM_DISTINCT), 1)
                for count in counts:
                    for first in {0, (max(counts) - count) % _NUM_DISTINCT}:
                        found = functional.linear(rows[first : first + count].contiguous(), weight, bias)
                        if not have_equal_bits(found, expected[first : first + count]):
                            return False
        except RuntimeError:  # such as a lack of memory
            return None
    return True


@functools.cache
@keep_result(bool)
def has_free_attention(dtype: torch.dtype, num_heads: int, num_key_heads: int, head_size: int) -> bool | None:
    """Probe whether one thread gives one text's attention the same bits wherever its states lie in larger tensors."""
    generator = torch.Generator().manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=num_heads // num_key_heads, is_causal=True, training=False)
    with torch.inference_mode(), one_thread():
        try:
            for num_new, num_held in _NEW_AND_HELD:
                query, keys, values = _cancelling_states(
                    dtype, num_heads, num_key_heads, head_size, num_new, num_held, generator
                )
                mask = None
                if num_new > 1 and num_held:
                    mask = torch.ones((1, 1, num_new, num_held + num_new), dtype=torch.bool).tril(num_held)
                expected, _ = torch_attention(module, query, keys, values, mask)
                for spare in _SPARES:
                    placed = (
                        _place_among_others(query, spare),
                        _place_in_room(keys, spare),
                        _place_in_room(values, spare),
                    )
                    found, _ = torch_attention(module, placed[0], placed[1], placed[2], mask)
                    if not have_equal_bits(found, expected):
                        return False
        except RuntimeError:
            return None
    return True


def has_free_elements(function: Callable[[Tensor], Tensor], dtype: torch.dtype, size: int, num_threads: int) -> bool:
    """Probe whether an element of rows of `size` has the same bits wherever it is, and whichever thread computes it."""
    shares = VECTOR_BYTES // dtype.itemsize * math.lcm(*range(1, num_threads + 1))
    if not size % shares:
        return True  # no vector is cut
    if dtype.itemsize == 2:
        values = torch.arange(1 << 16).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
    else:
        values = 8 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode(), one_thread():
        parts = torch.cat([function(part.clone()) for part in values.split(_LEFT_OVER)])
        return have_equal_bits(function(values), parts)


def _place_among_others(query: Tensor, spare: int) -> Tensor:
    """Return queries ``[1, heads, tokens, dim]`` as a part of those of more tokens, as a layer computes them."""
    _, num_heads, num_new, size = query.shape
    room = query.new_zeros(1, spare + num_new, num_heads, size).transpose(1, 2)
    return room.narrow(2, spare, num_new).copy_(query)


def _place_in_room(states: Tensor, spare: int) -> Tensor:
    """Return keys or values ``[1, heads, tokens, dim]`` in a KV cache that has room for more."""
    _, num_heads, num_kv, size = states.shape
    return states.new_zeros(1, num_heads, num_kv + spare, size).narrow(2, 0, num_kv).copy_(states)


def _cancelling_states(
    dtype: torch.dtype,
    num_heads: int,
    num_key_heads: int,
    head_size: int,
    num_new: int,
    num_held: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make attention of which little but rounding errors remains for the last token: values with equal weights cancel."""
    num_kv = num_held + num_new
    query, keys, values = (
        torch.randn((1, heads, length, head_size), generator=generator).to(dtype)
        for heads, length in ((num_heads, num_new), (num_key_heads, num_kv), (num_key_heads, num_kv))
    )
    half = num_kv // 2
    keys[:, :, half : 2 * half], values[:, :, half : 2 * half] = keys[:, :, :half], -values[:, :, :half]
    return query, keys, values


def find_functions(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules that may be functions of single elements: those without parts and numbers of their own."""
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        own = [*module.children(), *module.parameters(), *module.buffers()]
        if not own and type(module).__module__.startswith(("torch.nn.modules.activation", "transformers.activations")):
            found.setdefault(repr(module), module)
    return list(found.values())

"""Finds out whether torch's attention gives the same bits if it reads fewer of the tokens behind those that a mask lets it see.

Knows the attention function that transformers' models call; no models and no stages.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from lingualinked.model.exact.bits import have_equal_bits
from lingualinked.model.hf_internals.computing import torch_attention
from lingualinked.model.process.torch_settings import torch_settings

_NUM_DRAWS = 8  # of random states; a row of heads alone has thousands of results


class AttentionShape(NamedTuple):
    """What attention is computed of, for one new token of each row."""

    dtype: torch.dtype
    device: torch.device
    num_rows: int
    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int


@functools.cache
def is_length_free(
    shape: AttentionShape, num_read: int, max_cache_len: int, settings: tuple[tuple[str, bool | int | str], ...]
) -> bool:
    """Return whether reading `num_read` tokens gives the bits of reading `max_cache_len`, if a mask hides all behind them.

    `settings` are torch's, with which attention is computed. If memory is too short to find out, the answer is no.
    """
    try:
        with torch_settings(dict(settings)):
            return _is_length_free(shape, num_read, max_cache_len)
    except RuntimeError:
        return False


def _is_length_free(shape: AttentionShape, num_read: int, max_cache_len: int) -> bool:
    dtype, device, rows, heads, key_heads, key_dim, value_dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(num_heads: int, tokens: int, dim: int) -> torch.Tensor:
        states = torch.randn((rows, num_heads, tokens, dim), generator=generator, device=device)
        return (3 * states).to(dtype)  # wide scores: sums of few large and many small weights

    module: Any = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True, training=False)
    with torch.inference_mode():
        for index in range(_NUM_DRAWS):
            query = draw(heads, 1, key_dim)
            keys, values = draw(key_heads, max_cache_len, key_dim), draw(key_heads, max_cache_len, value_dim)
            num_seen = num_read - index * num_read // (2 * _NUM_DRAWS)
            mask = (torch.arange(max_cache_len, device=device) < num_seen).expand(rows, 1, 1, -1)
            whole, _ = torch_attention(module, query, keys, values, mask)
            keys, values = keys.narrow(2, 0, num_read), values.narrow(2, 0, num_read)
            part, _ = torch_attention(module, query, keys, values, mask[..., :num_read])
            if not have_equal_bits(part, whole):
                return False
    return True

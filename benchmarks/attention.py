"""The part of ``python -m benchmarks products`` that compares attention of new tokens with torch's, bit for bit.

Knows the attention function of stages; draws shapes, masks and values.
"""

from __future__ import annotations

import math
import random
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lingualinked.console import new_console
from lingualinked.errors import LingualinkedError
from lingualinked.model.exact import exact_attention
from lingualinked.model.hf_internals.computing import torch_attention
from lingualinked.tables import Rows

DTYPES = (torch.bfloat16, torch.float16)
MASKS = ("none", "padded", "choices", "addends")
DIMS = (16, 40, 64, 64, 80, 96, 128, 128, 256)
GROUPS = (1, 1, 2, 3, 4, 5, 8)
NEW_TOKENS = (1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 32, 37, 64, 128, 200, 256)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38, -3e38)
_SAMPLED_CASES = 2
_SAMPLED_OUTPUTS = 20_000


def run_attention(num_outputs: int, sample: str) -> None:
    """Print how many outputs were compared of each dtype and mask; raise an error if one differs."""
    draw = random.Random(sample)  # noqa: S311 - draws shapes, no secret
    cases = [(dtype, mask) for dtype in DTYPES for mask in MASKS]
    if sample:
        cases, num_outputs = draw.sample(cases, _SAMPLED_CASES), min(num_outputs, _SAMPLED_OUTPUTS)
    found, num_different = [], 0
    for dtype, mask in cases:
        start_s = time.monotonic()
        compared, different, by_kernel = 0, 0, 0
        while compared < num_outputs:
            torch.set_num_threads(draw.choice((1, 2)))
            with torch.inference_mode():
                size, num_equal, used = _compare(dtype, mask, draw)
            compared, different, by_kernel = compared + size, different + size - num_equal, by_kernel + size * used
        num_different += different
        name = str(dtype).removeprefix("torch.")
        share = f"{by_kernel / compared:.0%}"
        found.append((mask, name, share, f"{compared:,}", f"{different:,}", f"{time.monotonic() - start_s:.0f}"))
    columns = ("mask", "dtype", "by attention.c", "compared", "different", "s")
    new_console().print(Rows("Attention of 1 to 256 new tokens against torch's, bit for bit", columns, found))
    if num_different:
        raise LingualinkedError(
            f"{num_different:,} outputs of attention differ from torch's: please report this, with the table above"
        )


def _compare(dtype: torch.dtype, mask_kind: str, draw: random.Random) -> tuple[int, int, bool]:
    """Compare attention of one shape; return how many outputs there are, how many are equal, and if the kernel is used."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 32))
    group, dim = draw.choice(GROUPS), draw.choice(DIMS)
    num_new = 1 if mask_kind == "none" else draw.choice(NEW_TOKENS)
    num_tokens = draw.choice(
        (draw.randint(1, 70), draw.randint(1, 1100), draw.randint(500, 530), draw.randint(1, 5000))
    )
    num_rows, num_key_heads = draw.choice((1, 2, 3)), draw.choice((1, 2, 4))
    query = torch.randn(num_rows, num_new, num_key_heads * group, dim, generator=generator).transpose(1, 2)
    keys, values = torch.randn(2, num_rows, num_key_heads, num_tokens + 5, dim, generator=generator)
    half, places = num_tokens // 2, torch.randperm(num_tokens, generator=generator)
    if draw.random() < 0.5:  # pairs of equal weights and opposite values
        keys[:, :, places[half : 2 * half]] = keys[:, :, places[:half]]
        values[:, :, places[half : 2 * half]] = -values[:, :, places[:half]]
    states = [query, keys, values]
    if draw.random() < 0.2:
        _strew(states[draw.randrange(3)], draw, generator)
    query, keys, values = (each.to(dtype) for each in states)
    keys, values = keys[:, :, :num_tokens], values[:, :, :num_tokens]  # as in a cache with room
    mask = _random_mask(mask_kind, query, num_tokens, draw, generator)
    scale = draw.choice((dim**-0.5, 1.1 * dim**-0.5, 0.1, 1.0, 30.0))
    layer: Any = SimpleNamespace(num_key_value_groups=group)
    ours, _ = exact_attention.attend(layer, query, keys, values, mask, scaling=scale)
    theirs, _ = torch_attention(layer, query, keys, values, mask, scaling=scale)
    equal = (ours.view(torch.int16) == theirs.view(torch.int16)) | (ours.isnan() & theirs.isnan())
    return ours.numel(), int(equal.sum()), exact_attention.uses_kernel(layer, query, keys, values, mask)


def _strew(states: Tensor, draw: random.Random, generator: torch.Generator) -> None:
    """Replace some numbers by unusual ones, or all by numbers that are too small to be normal."""
    if draw.random() < 0.2:
        states *= 1e-40
    else:
        chosen = torch.rand(states.shape, generator=generator) < draw.choice((1e-5, 1e-3, 0.1))
        values = torch.tensor(draw.sample(SPECIAL, 3))
        numbers = torch.randint(len(values), states.shape, generator=generator)
        states.copy_(torch.where(chosen, values[numbers], states))


def _random_mask(
    kind: str, query: Tensor, num_tokens: int, draw: random.Random, generator: torch.Generator
) -> Tensor | None:
    num_rows, num_heads, num_new, _ = query.shape
    places = torch.arange(num_tokens)
    if kind == "none":
        return None
    if kind == "padded":  # on the left; tokens see what lies before them
        starts = torch.randint(num_tokens, (num_rows, 1, 1, 1), generator=generator)
        return (places >= starts) & (places <= num_tokens - num_new + torch.arange(num_new)[:, None])
    size = (draw.choice((1, num_rows)), draw.choice((1, num_heads)), num_new, num_tokens)
    choices = torch.rand(size, generator=generator) < draw.choice((0.01, 0.3, 0.9, 1.0))
    if kind == "choices":
        return choices
    lowest = draw.choice((-math.inf, torch.finfo(query.dtype).min))
    return torch.randn(size, generator=generator).masked_fill(~choices, lowest).to(query.dtype)

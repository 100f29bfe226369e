"""torch's attention for decoding, computed by a kernel that has been found to have its bits.

Knows the attention function that transformers' models call; no models and no stages.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingualinked.kernels import attention
from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.hf_internals import torch_attention

# Blocks of torch's kernel have 512 tokens, its vectors 16.
_PROBED_TOKENS = (1, 2, 3, 5, 15, 16, 34, 49, 64, 203, 511, 551, 1102)
_NUM_ROWS, _NUM_KEY_HEADS = 8, 2
_NUM_LAST = 9
_ARGUMENTS = ("dropout", "position_bias", "cache", "softcap", "output_attentions")  # that the kernel leaves to torch


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' function for "sdpa" does, of which this has the arguments and the bits.

    States are ``[rows, heads, tokens, dim]``; the result is ``[rows, tokens, heads, dim]``.
    """
    if attention_mask is None and attention.accepts(query, key, value) and not any(map(kwargs.get, _ARGUMENTS)):
        group = query.shape[1] // key.shape[1]
        if (
            group == getattr(module, "num_key_value_groups", 1)
            and _computes_fused()
            and is_exact(query.shape[3], group, torch.get_num_threads())
        ):
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            return attention.attend(query, key, value, scale), None
    return torch_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _computes_fused() -> bool:
    """Return whether the settings of torch let it choose the function whose order the kernel has."""
    return (
        torch._C._get_flash_sdp_enabled()  # noqa: SLF001 - what the public function calls, without its overhead
        and torch._C._get_mkldnn_enabled()  # noqa: SLF001 - as the probe
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
@keep_result(bool)
def is_exact(dim: int, group: int, num_threads: int) -> bool:  # noqa: ARG001 - torch's choices may depend on it
    """Probe whether the kernel has the bits of torch's attention, where `group` heads share keys and values."""
    if not attention.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        try:
            return all(
                _is_equal(*make(dim, group, num_tokens, generator))
                for num_tokens in _PROBED_TOKENS
                for make in (cancelling_scores, cancelling_values)
            )
        except (AttributeError, RuntimeError):  # this build of torch has no such function
            return False


Attention = tuple[Tensor, Tensor, Tensor, float]
"""Query [rows, heads, 1, dim], keys and values of all rows, [1, key heads, tokens, dim], and the scale of scores."""


def cancelling_scores(dim: int, group: int, num_tokens: int, generator: torch.Generator) -> Attention:
    """Make scores of which only rounding errors remain, scaled up until they determine the weights."""
    query, keys, values = _random_states(dim, group, num_tokens, generator)
    places = torch.randperm(dim, generator=generator)
    back = torch.randperm(dim // 2, generator=generator)
    query, keys = query[..., : dim // 2], keys[..., : dim // 2]
    query = torch.cat([query, -query[..., back]], dim=-1)[..., places]
    keys = torch.cat([keys, keys[..., back]], dim=-1)[..., places]
    return query, keys, values, 2.0**20


def cancelling_values(dim: int, group: int, num_tokens: int, generator: torch.Generator) -> Attention:
    """Make values of which pairs with equal weights cancel, so that rounding errors are large in the result.

    One token of the last block has the highest score, zero, no value, and about the weight of all others together: the
    logarithm of a sum that is close to 2 shows the sum's last bits.
    """
    query, keys, values = _random_states(dim, group, num_tokens, generator)
    half = num_tokens // 2
    places = torch.randperm(num_tokens, generator=generator)
    keys[:, :, places[half : 2 * half]] = keys[:, :, places[:half]]
    values[:, :, places[half : 2 * half]] = -values[:, :, places[:half]]
    scale = dim**-0.5
    query[..., 0], keys[..., 0] = 1, -math.log(num_tokens) / scale
    keys[:, :, -_NUM_LAST:][:, :, :1] = values[:, :, -_NUM_LAST:][:, :, :1] = 0
    return query, keys, values, scale


def _random_states(dim: int, group: int, num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = max(1, _NUM_ROWS // group)
    shapes = [(num_rows, _NUM_KEY_HEADS * group, 1, dim), *[(1, _NUM_KEY_HEADS, num_tokens, dim)] * 2]
    return tuple(  # type: ignore[return-value]
        (
            torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-3, 3, (*shape[:-1], 1), generator=generator)
        ).bfloat16()
        for shape in shapes
    )


def _is_equal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> bool:
    keys, values = (each.expand(len(query), -1, -1, -1) for each in (keys, values))
    logsums = torch.empty(query.shape[:2])
    ours = attention.attend(query, keys, values, scale, logsums).transpose(1, 2)
    group = query.shape[1] // keys.shape[1]
    theirs = functional.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=group > 1)
    # The sums are compared as well: a result of few bits hides most differences between them.
    keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - what it calls
    their_sums = function(query, keys, values, scale=scale)[1].squeeze(2)
    return torch.equal(ours.view(torch.int16), theirs.view(torch.int16)) and torch.equal(logsums, their_sums)

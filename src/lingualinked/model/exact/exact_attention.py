"""torch's attention for decoding and for chunks of a prompt, computed by a kernel that has been found to have its bits.

Knows the attention function that transformers' models call; no models and no stages.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingualinked.kernels import attention
from lingualinked.model.exact.kept_probes import keep_result
from lingualinked.model.hf_internals.computing import torch_attention

# Blocks of torch's kernel have 512 tokens, its vectors 16; MKL multiplies fewer than 12 or more than 192 otherwise.
_TOKENS_OF_PRODUCTS = (1, 2, 3, 5, 11, 16, 34, 203, 511, 551)
_TOKENS_OF_SUMS = (1, 2, 14, 15, 16, 17, 34, 49, 203, 551, 1102)
_TOKENS_OF_BLOCKS = (5, 16, 203, 551)
_NUM_FEW = 16  # new tokens
_NUM_QUERIES = 8  # of all rows and new tokens that share keys
_NUM_KEY_HEADS = 2
_NUM_SUMS = 64
_NUM_LAST = 9
# Exponentials of these lie so close to halfway between two float32 numbers that functions of little error round them otherwise.
_HARD = "-1.3bb514p-6 -1.57d3f6p-3 -1.404a0ep-3 -1.55f426p-3 -1.ed2b5cp-2 -1.3cf108p-2 -1.5b97b8p-2 -1.50dc90p-3"
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
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    is_causal = attention_mask is None and query.shape[2] > 1
    is_usual = not has_unknown(kwargs) and (not is_causal or (scale > 0 and kwargs.get("is_causal") is None))
    if is_usual and uses_kernel(module, query, key, value, attention_mask):
        together = _together(query.shape[1] // key.shape[1], query.shape[2], attention_mask is not None)
        return attention.attend(query, key, value, scale, attention_mask, together, None, is_causal), None
    return torch_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def uses_kernel(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> bool:
    """Return whether the kernel computes this, since it does as torch."""
    group, num_new, is_masked = query.shape[1] // key.shape[1], query.shape[2], attention_mask is not None
    return bool(
        (num_new == 1 or is_masked or _is_prompt(module, num_new, key.shape[2]))
        and not torch.is_grad_enabled()
        and group == getattr(module, "num_key_value_groups", 1)
        and attention.accepts(query, key, value, attention_mask, _together(group, num_new, is_masked))
        and computes_fused()
        and is_exact(query.dtype, query.shape[3], *_alike(group, num_new), is_masked, torch.get_num_threads())
    )


def _is_prompt(module: nn.Module, num_new: int, num_tokens: int) -> bool:
    """Return whether this is causal attention over the new tokens alone."""
    return _NUM_FEW < num_new == num_tokens and getattr(module, "is_causal", True) is True


def attend_texts(
    query: Tensor, key: Tensor, value: Tensor, texts: Sequence[attention.Text], scaling: float | None = None
) -> Tensor:
    """Compute attention of texts with one new token each, with the bits of `attend` for each alone; add their new states to them.

    New states are ``[1, heads, places, dim]``, the result is ``[1, places, heads, dim]``, of which only the texts' places count.
    """
    _, num_heads, num_places, dim = query.shape
    result = query.new_empty(1, num_places, num_heads, dim)
    attention.attend_texts(query, key, value, texts, dim**-0.5 if scaling is None else scaling, result)
    return result


def uses_kernel_for_texts(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, arguments: Mapping[str, Any]
) -> bool:
    """Return whether `attend_texts` may compute this, given the new states and the named arguments of `attend`."""
    one_query, one_key, one_value = (each.narrow(2, 0, 1) for each in (query, key, value))
    return not has_unknown(arguments) and uses_kernel(module, one_query, one_key, one_value, None)


def _together(group: int, num_new: int, is_masked: bool) -> int:
    """Return how many queries torch multiplies at once: transformers joins those of heads that share keys, under a mask."""
    return group if is_masked and num_new == 1 else attention.block_of(num_new)


def _alike(group: int, num_new: int) -> tuple[int, int]:
    """Return a group and a number of new tokens that show the same order: of many, the groups do not matter."""
    return (group, num_new) if num_new <= _NUM_FEW else (min(group, 2), attention.like_blocks(num_new))


def has_unknown(arguments: Mapping[str, Any]) -> bool:
    """Return whether one of the named arguments of `attend` makes torch compute what the kernel does not."""
    values = map(arguments.get, _ARGUMENTS)
    return any(value is not None and (isinstance(value, Tensor) or bool(value)) for value in values)


def computes_fused() -> bool:
    """Return whether the settings of torch let it choose the function whose order the kernel has."""
    return (
        torch._C._get_flash_sdp_enabled()  # noqa: SLF001 - what the public function calls, without its overhead
        and torch._C._get_mkldnn_enabled()  # noqa: SLF001 - as the probe
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
@keep_result(bool)
def is_exact(dtype: torch.dtype, dim: int, group: int, num_new: int, is_masked: bool, num_threads: int) -> bool | None:
    """Probe whether the kernel has the bits of torch's attention, where `group` heads share keys and values."""
    if not attention.is_available() or not _are_sums_exact(dtype, is_masked, num_threads):
        return False
    num_rows = max(2, _NUM_QUERIES // (group * num_new))
    tokens: tuple[int, ...] = _TOKENS_OF_PRODUCTS if num_new <= _NUM_FEW else _TOKENS_OF_BLOCKS
    if num_new > 1 and not is_masked:  # over more tokens, the order is as under a mask
        if not is_exact(dtype, dim, group, num_new, True, num_threads):
            return False
        tokens = (num_new,)
    return _is_exact_in(
        (cancelling_scores, cancelling_values, tiny_values),
        Shape(dtype, num_rows, group, num_new, dim),
        tokens,
        is_masked,
    )


@functools.cache
@keep_result(bool)
def _are_sums_exact(dtype: torch.dtype, is_masked: bool, num_threads: int) -> bool | None:  # noqa: ARG001 - results may depend on it
    """Probe sums of exponentials, which depend on no other size: of many queries, since few of them show another order."""
    shape = Shape(dtype, _NUM_SUMS, 1, 1, 16)
    return _is_exact_in((cancelling_values, tied_results, hard_exponentials), shape, _TOKENS_OF_SUMS, is_masked)


class Shape(NamedTuple):
    """What a probe's states have, whatever the number of tokens."""

    dtype: torch.dtype
    num_rows: int
    group: int
    num_new: int
    dim: int


class Attention(NamedTuple):
    """What attention is computed of."""

    query: Tensor  # [rows, heads, new tokens, dim]
    keys: Tensor  # of all rows, [1, key heads, tokens, dim]
    values: Tensor
    scale: float
    mask: Tensor | None  # [rows, heads, new tokens, tokens]


MakeAttention = Callable[[Shape, int, torch.dtype | None, torch.Generator], Attention]
"""From a shape, a number of tokens, the dtype of a mask and random numbers."""


def _is_exact_in(makes: Iterable[MakeAttention], shape: Shape, tokens: Iterable[int], is_masked: bool) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    mask_dtypes = (torch.bool, shape.dtype) if is_masked else (None,)
    with torch.inference_mode():
        try:
            return all(
                _is_equal(make(shape, num_tokens, mask_dtype, generator))
                for num_tokens, make, mask_dtype in itertools.product(tokens, makes, mask_dtypes)
            )
        except AttributeError:  # this build of torch has no such function
            return False
        except RuntimeError:  # such as a lack of memory
            return None


def cancelling_scores(
    shape: Shape, num_tokens: int, mask_dtype: torch.dtype | None, generator: torch.Generator
) -> Attention:
    """Make scores of which only rounding errors remain, scaled up until they determine the weights."""
    query, keys, values = _random_states(shape, num_tokens, generator)
    half = shape.dim // 2
    places = torch.randperm(shape.dim, generator=generator)
    back = torch.randperm(half, generator=generator)
    query, keys = query[..., :half], keys[..., :half]
    query = torch.cat([query, -query[..., back]], dim=-1)[..., places]
    keys = torch.cat([keys, keys[..., back]], dim=-1)[..., places]
    return _attention(shape, query, keys, values, 1.1 * 2.0**20, mask_dtype, generator)


def cancelling_values(
    shape: Shape, num_tokens: int, mask_dtype: torch.dtype | None, generator: torch.Generator
) -> Attention:
    """Make values of which pairs with equal weights cancel, so that rounding errors are large in the result.

    One token of the last block has the highest score, zero, no value, and about the weight of all others together: the
    logarithm of a sum that is close to 2 shows the sum's last bits.
    """
    query, keys, values = _random_states(shape, num_tokens, generator)
    half = num_tokens // 2
    places = torch.randperm(num_tokens, generator=generator)
    keys[:, :, places[half : 2 * half]] = keys[:, :, places[:half]]
    values[:, :, places[half : 2 * half]] = -values[:, :, places[:half]]
    scale = 1.1 * shape.dim**-0.5  # no power of two, by which scores would be multiplied without rounding them
    query[..., 0], keys[..., 0] = 1, -math.log(num_tokens) / scale
    keys[:, :, -_NUM_LAST:][:, :, :1] = values[:, :, -_NUM_LAST:][:, :, :1] = 0
    return _attention(shape, query, keys, values, scale, mask_dtype, generator)


def tiny_values(shape: Shape, num_tokens: int, mask_dtype: torch.dtype | None, generator: torch.Generator) -> Attention:
    """Make values too small to be normal numbers, whose products with small weights show if they are rounded or fused."""
    query, keys, values = _random_states(shape, num_tokens, generator)
    values *= 2.0**-132
    return _attention(shape, query, keys, values, 1.1, mask_dtype, generator)


def tied_results(
    shape: Shape, num_tokens: int, mask_dtype: torch.dtype | None, generator: torch.Generator
) -> Attention:
    """Make results halfway between two numbers of the dtype: means of neighbours, with equal weights."""
    query, keys, values = _random_states(shape, num_tokens, generator)
    values = values[:, :, :1].to(shape.dtype).expand(keys.shape).clone()
    values[:, :, num_tokens // 2 :] = values[:, :, num_tokens // 2 :].nextafter(
        torch.tensor(math.inf, dtype=shape.dtype)
    )
    return _attention(shape, query, 0 * keys, values, 1, mask_dtype, generator)


def hard_exponentials(
    shape: Shape, num_tokens: int, mask_dtype: torch.dtype | None, generator: torch.Generator
) -> Attention:
    """Make scores whose exponentials are hard to round: of the last token; of others they are zero.

    Such a score is the sum of three numbers of the dtype, each in a dimension of its own: the same in any order.
    """
    query, keys, values = (torch.zeros_like(each) for each in _random_states(shape, num_tokens, generator))
    by = 2.0**8  # so that float16 has these numbers
    for number, score in enumerate(map(float.fromhex, _HARD.split())):
        head, dim, rest = number % _NUM_KEY_HEADS, number // _NUM_KEY_HEADS * 4, torch.tensor(by * score)
        for place in range(dim, dim + 3):
            keys[0, head, -1, place] = rest.to(shape.dtype)
            rest -= keys[0, head, -1, place]
            query[dim // 4 :: 4, ..., place] = 1 / by
    return _attention(shape, query, keys, values, 1, mask_dtype, generator)


def _random_states(shape: Shape, num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [
        (shape.num_rows, _NUM_KEY_HEADS * shape.group, shape.num_new, shape.dim),
        *[(1, _NUM_KEY_HEADS, num_tokens, shape.dim)] * 2,
    ]
    return tuple(  # type: ignore[return-value]
        torch.randn(size, generator=generator) * 2.0 ** torch.randint(-3, 3, (*size[:-1], 1), generator=generator)
        for size in sizes
    )


def _attention(
    shape: Shape,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask_dtype: torch.dtype | None,
    generator: torch.Generator,
) -> Attention:
    """Add a mask that does nothing in half of the rows; in the others it hides tokens, all of them from one query."""
    mask = None
    if mask_dtype is not None:
        size = (*query.shape[:3], keys.shape[2])
        mask = torch.rand(size, generator=generator) < 0.8
        mask[-1, -1, -1] = False
        mask[::2] = True
        if mask_dtype is not torch.bool:
            mask = torch.randn(size, generator=generator).masked_fill(~mask, -math.inf)
            mask[::2] = 0
            mask = mask.to(mask_dtype)
    return Attention(query.to(shape.dtype), keys.to(shape.dtype), values.to(shape.dtype), scale, mask)


def _is_equal(states: Attention) -> bool:
    query, keys, values, scale, mask = states
    num_rows, num_heads, num_new, dim = query.shape
    keys, values = (each.expand(num_rows, -1, -1, -1) for each in (keys, values))
    group = num_heads // keys.shape[1]
    together = _together(group, num_new, mask is not None)
    logsums = torch.empty(query.shape[:3])
    is_causal = mask is None and num_new > 1
    ours = attention.attend(query, keys, values, scale, mask, together, logsums, is_causal)
    layer: Any = SimpleNamespace(num_key_value_groups=group)
    theirs, _ = torch_attention(layer, query, keys, values, mask, scaling=scale)
    if not torch.equal(ours.view(torch.int16), theirs.view(torch.int16)):
        return False
    # The sums are compared as well: a result of few bits hides most differences between them.
    joined = max(num_new, together)  # queries of one head, as the function gets them: with one new token, of one group
    shape = (num_rows, num_heads * num_new // joined, joined)
    keys, values = (each.repeat_interleave(shape[1] // each.shape[1], dim=1) for each in (keys, values))
    if mask is not None:
        mask = torch.where(mask, 0.0, -math.inf).to(query.dtype) if mask.dtype is torch.bool else mask
        mask = mask.reshape(*shape, -1)
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - what it calls
    their_sums = function(query.reshape(*shape, dim), keys, values, 0.0, is_causal, attn_mask=mask, scale=scale)[1]
    return torch.equal(logsums, their_sums.reshape(logsums.shape))

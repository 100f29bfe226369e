"""Rotary embeddings for decoding, by a kernel that has been found to have the bits of a model's own function.

Knows the function by which transformers' models rotate; no models and no stages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lingualinked.kernels import rotary
from lingualinked.model.exact.bits import DIGITS, have_equal_bits, tiny
from lingualinked.model.exact.kept_probes import keep_result

Rotation = Callable[..., tuple[Tensor, Tensor]]
"""From queries ``[rows, heads, tokens, dim]``, keys, cosines ``[rows or 1, tokens, dim]`` and sines to both, rotated."""


@functools.cache
def faster_rotation(own: Rotation) -> Rotation:
    """Return a function with the arguments and the bits of a model's own, which computes decoding by the kernel."""

    def rotate(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if len(args) == 4 and not kwargs and _is_plain(*args):
            queries, keys, cosines, _ = args
            if _is_exact(own, queries.dtype, queries.shape, keys.shape, cosines.shape, torch.get_num_threads()):
                result = rotary.rotate(*args)
                if result is not None:
                    return result
        return own(*args, **kwargs)

    rotate.__wrapped__ = own  # type: ignore[attr-defined]
    return rotate


def uses_kernel(function: Any, dtype: torch.dtype, *shapes: Sequence[int]) -> bool:
    """Return whether a function of `faster_rotation` rotates queries, keys and angles of these shapes by the kernel."""
    own = getattr(function, "__wrapped__", None)
    return own is not None and _is_exact(own, dtype, *map(torch.Size, shapes), torch.get_num_threads())


def _is_plain(queries: Any, keys: Any, cosines: Any, sines: Any) -> bool:
    """Say whether torch rotates these states with the kernels of its default settings, without gradients."""
    return (
        type(queries) is type(keys) is type(cosines) is type(sines) is Tensor
        and queries.dtype is keys.dtype is cosines.dtype is sines.dtype
        and queries.is_cpu
        and keys.is_cpu
        and cosines.is_cpu
        and sines.is_cpu
        and queries.dim() == keys.dim() == 4
        and cosines.dim() == 3
        and cosines.shape == sines.shape
        and rotary.accepts(queries, keys, cosines, sines)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _is_exact(own: Rotation, dtype: torch.dtype, *arguments: Any) -> bool:
    """Probe whether the kernel has the bits of a function, for shapes of queries, keys and angles and a number of threads."""
    *shapes, _ = arguments
    is_possible = rotary.is_available() and rotary.accepts_shapes(dtype, *shapes)
    return is_possible and bool(_has_its_bits(_Named(own), dtype, *map(tuple, shapes), arguments[-1]))


class _Named:
    """A function that is written as its name."""

    def __init__(self, function: Rotation) -> None:
        self.function = function

    def __str__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


@keep_result(bool)
def _has_its_bits(own: _Named, dtype: torch.dtype, *arguments: Any) -> bool | None:
    *shapes, _ = arguments
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        try:
            return all(
                _are_equal(rotary.rotate(*inputs), own.function(*inputs))
                for inputs in all_inputs(dtype, shapes, generator)
            )
        except (RuntimeError, TypeError):  # it has other arguments, or memory is short
            return None


def all_inputs(
    dtype: torch.dtype, shapes: Sequence[Sequence[int]], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Make queries, keys, cosines and sines that show any other rounding, or treatment of values that are not normal."""
    steps = 1 << (DIGITS[dtype] + 1) // 2
    for scale, angle_scale in ((1, 1), (tiny(dtype), 1), (1, tiny(dtype))):
        for are_tied in (False, True):
            drawn = []
            for shape in (*shapes, shapes[2]):
                if are_tied:  # products, and their sums, lie halfway between two values
                    values = (2 * torch.randint(-steps // 2, steps // 2, shape, generator=generator) + 1) / steps
                else:
                    values = torch.randn(shape, generator=generator)
                drawn.append((values * (scale if len(shape) == 4 else angle_scale)).to(dtype))
            queries, keys, cosines, sines = drawn
            # Several tokens lie one after the other, with their heads, as projections give them.
            queries, keys = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (queries, keys))
            yield queries, keys, cosines, sines


def _are_equal(results: tuple[Tensor, ...] | None, expected: tuple[Tensor, ...]) -> bool:
    return results is not None and all(
        have_equal_bits(ours, theirs) and (ours.shape[2] == 1 or _strides(ours) == _strides(theirs))
        for ours, theirs in zip(results, expected, strict=True)
    )


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides by which elements are found: torch's attention may choose its order by them."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]

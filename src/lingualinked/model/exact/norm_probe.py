"""Finds out by trying which kind of RMS norm a class of modules computes, if the kernel has its bits.

Knows how such modules are made; no models.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingualinked.kernels import norm
from lingualinked.kernels.norm import Kind
from lingualinked.model.exact.bits import DIGITS, have_equal_bits, tiny
from lingualinked.model.exact.kept_probes import keep_result

_NUM_ROWS = 64  # whose last bits show the order of their sums; in all
_NUM_TIED = 4
_SHARE = 2.0**-18  # of a mean square that an epsilon leaves: each of its last bits changes what is left by a 64th


class NormShape(NamedTuple):
    """What the bits of a norm may depend on."""

    module_class: type[nn.Module]
    epsilon_name: str
    dtype: torch.dtype
    num_rows: int
    size: int
    num_threads: int


class NormInputs(NamedTuple):
    """States ``[rows, size]``, weight ``[size]`` and epsilon of a norm."""

    states: Tensor
    weight: Tensor
    epsilon: float


@functools.cache
def find_kind(shape: NormShape) -> Kind | None:
    """Return the kind of norm that is bit-equal to what the modules compute in this shape, or None."""
    if not (norm.is_available() and norm.accepts(shape.dtype, shape.num_rows, shape.size)):
        return None
    return Kind.__members__.get(_kind_name(*shape) or "")


@keep_result(str)
def _kind_name(*arguments: Any) -> str | None:
    shape, kinds = NormShape(*arguments), list(Kind)
    generator = torch.Generator().manual_seed(0)
    module = shape.module_class.__new__(shape.module_class)  # the arguments of its constructor are not known
    nn.Module.__init__(module)
    module.eval()
    with torch.inference_mode():
        for states, weight, epsilon in all_inputs(shape.dtype, shape.num_rows, shape.size, generator):
            module.weight = nn.Parameter(weight, requires_grad=False)
            setattr(module, shape.epsilon_name, epsilon)
            try:
                expected = module(states)
            except (RuntimeError, TypeError):  # it is no norm of one input, or memory is short
                return None
            kinds = [kind for kind in kinds if have_equal_bits(norm.normalise(states, weight, kind, epsilon), expected)]
            if not kinds:
                return ""
    return kinds[0].name


def all_inputs(dtype: torch.dtype, num_rows: int, size: int, generator: torch.Generator) -> Iterator[NormInputs]:
    """Make inputs that show any other order of summation, rounding, or treatment of values that are not normal."""
    for _ in range(max(4, _NUM_ROWS // num_rows)):
        yield cancelling_inputs(dtype, num_rows, size, generator)
    for _ in range(_NUM_TIED):
        yield tied_weights(dtype, num_rows, size, generator)
        yield tied_states(dtype, num_rows, size, generator)
    states, weight, _ = cancelling_inputs(dtype, num_rows, size, generator)
    yield NormInputs(tiny(dtype) * states, weight, 1e-6)
    yield NormInputs(states, tiny(dtype) * weight, 1e-6)
    if dtype is not torch.float16:
        yield NormInputs(2.0**-66 * states, weight, 2.0**-140)  # nor are squares


def cancelling_inputs(dtype: torch.dtype, num_rows: int, size: int, generator: torch.Generator) -> NormInputs:
    """Make rows of the same values, in turned order, and an epsilon that leaves hardly more of their mean squares than rounding errors.

    So the last bit of a mean changes nearly all results. Each order has errors of its own, since values have many magnitudes.
    """
    values = torch.randn(size, generator=generator) * 2.0 ** torch.randint(-9, 3, (size,), generator=generator)
    turns = torch.randint(size, (num_rows,), generator=generator).tolist()
    states = torch.stack([values.to(dtype).roll(turn) for turn in turns])
    weight = torch.rand(size, generator=generator) - 0.5
    return NormInputs(states, weight.to(dtype), -(1 - _SHARE) * _mean_square(states))


def tied_weights(dtype: torch.dtype, num_rows: int, size: int, generator: torch.Generator) -> NormInputs:
    """Make rows that a norm multiplies with 1, and then with weights, or 1 + weights, to numbers halfway between two values."""
    steps = 1 << (DIGITS[dtype] + 1) // 2
    states, weight = ((2 * torch.randint(steps // 2, (size,), generator=generator) + 1) / steps for _ in range(2))
    weight -= torch.randint(2, (size,), generator=generator)
    states = states.to(dtype).repeat(num_rows, 1)
    return NormInputs(states, weight.to(dtype), 1 - _mean_square(states))


def tied_states(dtype: torch.dtype, num_rows: int, size: int, generator: torch.Generator) -> NormInputs:
    """Make rows that a norm multiplies with 3/2, many to numbers halfway between two values; weights are powers of two."""
    steps = 1 << DIGITS[dtype] - 1
    states = (2 * torch.randint(steps // 2, (size,), generator=generator) + 1) / steps
    weight = torch.randint(-2, 2, (size,), generator=generator)
    states = states.to(dtype).repeat(num_rows, 1)
    return NormInputs(states, weight.to(dtype), torch.tensor(4 / 9).item() - _mean_square(states))


def _mean_square(states: Tensor) -> float:
    """Return the smallest mean square of a row, as torch computes it."""
    return states.float().pow(2).mean(-1).min().item()

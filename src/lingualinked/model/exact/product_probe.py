"""Finds out by trying which kernel multiplies as torch does here, bit for bit.

Knows no kernel; linear layers name them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lingualinked.model.exact.bits import have_equal_bits
from lingualinked.model.exact.products import (
    BLOCK_OUTPUTS,
    MakeProduct,
    absorbing_product,
    cancelling_product,
    sparse_product,
    tied_product,
)

MIN_ELEMENTS = 1 << 13  # of a weight; torch multiplies smaller ones itself, in another order, and at least as fast
PROBED_ELEMENTS = 1 << 20  # of a weight that is probed at full size; a larger one is probed with fewer outputs

Kernel = Callable[[Any, Tensor], Tensor]
"""From a linear layer and contiguous rows ``[M, in features]`` to their product ``[M, out features]``."""


class Shape(NamedTuple):
    """What the order of a product's summation may depend on."""

    dtype: torch.dtype
    num_rows: int
    in_features: int
    out_features: int
    has_bias: bool
    num_threads: int

    @property
    def is_small(self) -> bool:
        """Whether no kernel gains anything, so that there is nothing to find out and to keep."""
        return self.in_features * self.out_features < MIN_ELEMENTS


def find_exact_kernel(
    shape: Shape,
    make_layer: Callable[[nn.Linear], nn.Module],
    kernels_for: Callable[[Any, Tensor], Mapping[str, Kernel]],
) -> str | None:
    """Return the name of the first kernel that is bit-equal to torch's product in this shape; empty if none is.

    None says that they could not be compared: this build of torch or this processor has no such kernel, or memory is short.

    A large weight is probed with fewer outputs, with the same remainder modulo the block size of the kernels: with at
    least a block for each thread, since oneDNN shares out the inputs among threads that would have no outputs.
    """
    generator, equal = torch.Generator().manual_seed(0), None
    with torch.inference_mode():
        for make, num_elements in _products(shape.dtype):
            num_blocks = max(shape.num_threads, num_elements // shape.in_features // BLOCK_OUTPUTS)
            num_outputs = min(shape.out_features, num_blocks * BLOCK_OUTPUTS + shape.out_features % BLOCK_OUTPUTS)
            rows, weight, bias = make(
                shape.num_rows, shape.in_features, num_outputs, shape.has_bias, generator, shape.dtype
            )
            expected = functional.linear(rows, weight, bias)
            try:
                layer = make_layer(_linear(weight, bias))
                equal = [
                    name
                    for name, kernel in kernels_for(layer, rows).items()
                    if (equal is None or name in equal) and have_equal_bits(kernel(layer, rows), expected)
                ]
            except (AttributeError, RuntimeError):
                return None
            if not equal:
                return ""
    return equal[0] if equal else ""


def _products(dtype: torch.dtype) -> list[tuple[MakeProduct, int]]:
    """Return products, and how many elements of a weight they need to show any other order in some output."""
    products: list[tuple[MakeProduct, int]] = [
        (cancelling_product, PROBED_ELEMENTS),
        (absorbing_product, 2 * MIN_ELEMENTS),
    ]
    if dtype is torch.float32:  # of which products are rounded, too, unless they are fused
        products.append((sparse_product, 2 * MIN_ELEMENTS))
    else:
        products.append((tied_product, 2 * MIN_ELEMENTS))
    return products


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear

"""What probes of every kind know of numbers: the digits of a dtype, values that are not normal, and how bits are compared.

Knows no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
"""Binary digits of a value."""


def tiny(dtype: torch.dtype) -> float:
    """Return a factor whose products with ordinary values are no normal values."""
    return 2.0**-16 if dtype is torch.float16 else 2.0**-130


def have_equal_bits(result: Tensor | None, expected: Tensor) -> bool:
    """Say whether a result has the dtype, shape and bits that are expected, for which 0 and -0 are two values."""
    return (
        result is not None
        and result.dtype is expected.dtype
        and result.shape == expected.shape
        and torch.equal(result.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))
    )

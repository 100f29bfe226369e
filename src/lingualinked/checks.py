"""Checks of numbers that users pass. True and False are refused, although Python treats them as integers.

Knows no field; callers pass its name or the whole message.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any, TypeGuard

from lingualinked.errors import ArgumentError

MOST = 2**53
"""The largest count of anything: floats hold no larger integers exactly."""


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an integer or a float, including infinity and NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object, *, at_least: int) -> TypeGuard[int]:
    """Return whether a value is an integer of at least ``at_least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_count(value: object) -> TypeGuard[int]:
    """Return whether a value is a positive integer of at most `MOST`."""
    return is_integer(value, at_least=1) and value <= MOST


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a real number, NumPy's included."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_integer(value: object, *, at_least: int) -> int | None:
    """Return an integer, NumPy's included, as Python's own; ``None`` if it is none or less than that."""
    try:
        integer = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
    return None if isinstance(value, bool) or integer < at_least else integer


def as_index(value: object) -> int:
    """Return an index, NumPy's and a tensor's included, as Python's own; raise TypeError for others, and beyond 64 bits."""
    index: Any = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(index, bool) or not -(2**63) <= operator.index(index) < 2**63:
        raise TypeError(f"{value!r} is no index")
    return operator.index(index)


def check_positive(value: object, field: str) -> float:
    """Check that a value is a positive, finite number, and return it; ``field`` is its name in the error."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ArgumentError(f"{field}={value!r} must be a positive, finite number")
    return value


def as_float(value: object, refusal: str) -> float:
    """Return a number as a float, or infinity for an integer beyond all floats; for other values raise ``refusal``."""
    if not is_number(value):
        raise ArgumentError(refusal)
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf

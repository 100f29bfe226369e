"""Whether a value is a number that can be used. True and False are none, although Python counts them as integers.

Knows no field: whoever refuses a value says what it is.
"""

from __future__ import annotations

import math
from typing import TypeGuard

from lingualinked.errors import ArgumentError


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an integer or a float, which may be infinite or not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object, *, at_least: int) -> TypeGuard[int]:
    """Whether it is an integer from so many on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def check_positive(value: object, field: str) -> float:
    """Return a positive, finite number; refuse anything else, by the name of its field."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ArgumentError(f"{field}={value!r} must be a positive, finite number")
    return value


def as_float(value: object, refusal: str) -> float:
    """Return a number as a float, an integer beyond all floats as infinity; refuse anything else with these words."""
    if not is_number(value):
        raise ArgumentError(refusal)
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf

"""Formats numbers with units for messages, tables and figures.

Knows bytes, seconds and counted nouns; not what is measured or counted.
"""

from __future__ import annotations

import math

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_text(num_bytes: float, *, round_up: bool = False) -> str:
    """Format a memory size: ``"7.3 MiB"``; ``round_up`` writes three digits of a size that must suffice."""
    exponent = 0
    while True:
        size = num_bytes / 1024**exponent
        digits = 0 if exponent == 0 or abs(size) >= 100 else 2 if round_up and abs(size) < 10 else 1
        rounded = math.ceil(size * 10**digits) / 10**digits if round_up else round(size, digits)
        if abs(rounded) < 1024 or exponent == len(_BYTE_UNITS) - 1:
            return f"{rounded:,.{digits}f} {_BYTE_UNITS[exponent]}"
        exponent += 1


def seconds_text(seconds: float) -> str:
    """Format a duration: ``"12.3 ms"``."""
    if abs(seconds) >= 0.99995:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.1f} ms" if abs(seconds) >= 0.9995e-3 else f"{seconds * 1e6:,.0f} µs"


def count_text(number: int, noun: str) -> str:
    """Format a count of something, given in the singular: ``"1 stage"``, ``"2 stages"``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

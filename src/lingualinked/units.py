"""Parses amounts that people write with units: memory sizes, bandwidths, durations.

Knows no field; callers pass its name for the error.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from lingualinked.checks import as_float
from lingualinked.errors import ArgumentError

MOST_BYTES = 2**64 - 1
"""The largest memory that a processor addresses."""

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B|B)?\s*", re.IGNORECASE | re.ASCII)
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(bit|b|B)(?:/s|ps)\s*", re.ASCII)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|ms|us|µs)\s*", re.ASCII)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def parse_bytes(amount: int | str, field: str = "memory") -> int:
    """Parse a memory size in bytes or with a unit (``"512MiB"``, ``"1.5 GB"``); an error names ``field``."""
    match = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if match is not None:
        number_of_bytes = int(Fraction(match[1]) * _UNITS[(match[2] or "").upper()])
    elif isinstance(amount, int) and not isinstance(amount, bool):
        number_of_bytes = amount
    else:
        raise ArgumentError(
            f"{field}={amount!r} is not a valid memory size: write bytes, or a number with a unit (2GiB)"
        )
    if number_of_bytes <= 0:
        raise ArgumentError(f"{field}={amount!r} must be positive")
    return number_of_bytes


def parse_rate(rate: float | str, field: str = "bandwidth") -> float:
    """Parse bytes per second, or a number with a unit (``"100Mbit/s"``, ``"12.5MB/s"``; decimal prefixes)."""
    match = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if match is not None:
        bytes_per_s = float(match[1]) * 1000.0 ** " KMGT".index(match[2] or " ") / (1 if match[3] == "B" else 8)
    else:
        refusal = f"{field}={rate!r} is not a valid bandwidth: write bytes per second, or 100Mbit/s, or 12.5MB/s"
        bytes_per_s = as_float(rate, refusal)
    if not 0 < bytes_per_s < math.inf:
        raise ArgumentError(f"{field}={rate!r} must be positive and finite")
    return bytes_per_s


def parse_seconds(duration: float | str, field: str = "latency") -> float:
    """Parse a duration in seconds or with a unit (``"3ms"``, ``"250us"``), which may be zero."""
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is not None:
        seconds = float(match[1]) * _SECONDS[match[2]]
    else:
        refusal = f"{field}={duration!r} is not a valid duration: write seconds, or 3ms, or 250us"
        seconds = as_float(duration, refusal)
    if not 0 <= seconds < math.inf:
        raise ArgumentError(f"{field}={duration!r} must be finite and not negative")
    return seconds

"""Numbers as people read them.

Knows bytes and seconds only.
"""

from __future__ import annotations


def bytes_text(num_bytes: float) -> str:
    """Write an amount of memory: ``"7.3 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            digits = 0 if unit == "B" or abs(num_bytes) >= 100 else 1
            return f"{num_bytes:,.{digits}f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def seconds_text(seconds: float) -> str:
    """Write a duration: ``"12.3 ms"``."""
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} µs"

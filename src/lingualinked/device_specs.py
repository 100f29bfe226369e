"""The stated rates of a device, for plans that are made without a measurement.

Knows numbers with units; no model and no profile.
"""

from __future__ import annotations

import dataclasses
import math
import re

from lingualinked.checks import as_float
from lingualinked.errors import ArgumentError
from lingualinked.units import parse_rate

_FLOPS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)FLOP(?:/s|S|s)\s*", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpecs:
    """The stated compute and memory rates of a device.

    Use it with `estimate_profile` to plan for a device that can't be measured.

    Parameters
    ----------
    flops : float or str
        Floating-point operations per second in the model's dtype, or with a unit (``"2TFLOP/s"``).
    memory_bandwidth : float or str
        Bytes per second that it reads weights with, or with a unit (``"50GB/s"``).

    Raises
    ------
    ArgumentError
        For a value that can't be used; the message names the field.
    """

    flops: float | str
    memory_bandwidth: float | str

    def __post_init__(self) -> None:
        parse_rate(self.memory_bandwidth, "memory_bandwidth")
        if not 0 < self.flops_per_s < math.inf:
            raise ArgumentError(f"flops={self.flops!r} must be positive and finite")

    @property
    def flops_per_s(self) -> float:
        """Floating-point operations per second."""
        if isinstance(self.flops, str):
            match = _FLOPS.fullmatch(self.flops)
            if match is None:
                raise ArgumentError(f"flops={self.flops!r} is not a valid rate: write a number, or 2TFLOP/s")
            return float(match[1]) * 1000.0 ** " KMGTP".index(match[2] or " ")
        return as_float(self.flops, f"flops={self.flops!r} is not a valid rate: write a number, or 2TFLOP/s")

    @property
    def memory_bytes_per_s(self) -> float:
        """Bytes per second."""
        return parse_rate(self.memory_bandwidth, "memory_bandwidth")

"""The measured latency and bandwidth of one link.

Plain data; knows neither how it is measured nor what is sent.
"""

from __future__ import annotations

import dataclasses
import math

from lingualinked.errors import ArgumentError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """The measured latency and bandwidth of one link.

    Parameters
    ----------
    source, target : str
        Names of devices, or of the caller.
    latency_s : float
        Seconds of a small message, from sending to receiving.
    bandwidth_bytes_per_s : float or None
        Rate of large messages; ``None``: no limit.
    """

    source: str
    target: str
    latency_s: float
    bandwidth_bytes_per_s: float | None

    def __post_init__(self) -> None:
        link = f"of the link from {self.source!r} to {self.target!r}"
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ArgumentError(f"latency_s={self.latency_s!r} {link} must be finite and not negative")
        if self.bandwidth_bytes_per_s is not None and not 0 < self.bandwidth_bytes_per_s < math.inf:
            raise ArgumentError(f"bandwidth_bytes_per_s={self.bandwidth_bytes_per_s!r} {link} must be positive")

    def transfer_s(self, num_bytes: float) -> float:
        """Return the seconds for which a number of bytes occupies the link."""
        return 0.0 if self.bandwidth_bytes_per_s is None else num_bytes / self.bandwidth_bytes_per_s

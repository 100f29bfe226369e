"""When layers are moved: the knobs of the balancer.

Plain data; knows nothing of how it is followed.
"""

from __future__ import annotations

import dataclasses
import math

from lingualinked.checks import is_number
from lingualinked.errors import ArgumentError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePolicy:
    """When a running pipeline moves layers by itself.

    Parameters
    ----------
    min_gain : float
        A plan is better only if a mean step takes at least this share less time (hysteresis).
    horizon_s : float
        Seconds for which speeds are expected to last when no device has changed much recently; one that keeps changing is
        expected to change again as soon as it did before.
    margin : float
        Moving must save this many times what it costs, over the horizon.
    cooldown_s : float
        Seconds after a migration in which no other one is begun for speed's sake.
    confidence : float
        Standard errors by which a device's step times must differ from what they were before it counts as changed.
    max_memory : float
        Share of a device's memory beyond which layers are moved off it, from above 0 to 1.
    sample_interval_s : float
        Seconds between two looks at the devices' memory, load and temperature.

    Raises
    ------
    ArgumentError
        For a value that can't be used; the message names the field.
    """

    min_gain: float = 0.05
    horizon_s: float = 60.0
    margin: float = 2.0
    cooldown_s: float = 2.0
    confidence: float = 5.0
    max_memory: float = 0.95
    sample_interval_s: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise ArgumentError(f"{field.name}={value!r} of a rebalance policy must be finite and not negative")
        for name in ("horizon_s", "confidence", "max_memory", "sample_interval_s"):
            if getattr(self, name) == 0:
                raise ArgumentError(f"{name}=0 of a rebalance policy must be positive")
        if self.min_gain >= 1:
            raise ArgumentError(
                f"min_gain={self.min_gain!r} of a rebalance policy must be below 1: no plan saves all time"
            )
        if self.max_memory > 1:
            raise ArgumentError(f"max_memory={self.max_memory!r} of a rebalance policy must be a share, at most 1")

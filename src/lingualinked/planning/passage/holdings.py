"""What plans make devices hold, alone and two at a time, and how much each device can hold.

Knows bytes; not which plan is better.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

from lingualinked.device import Device
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import Profile
from lingualinked.transmission import Transmission
from lingualinked.weight_bytes import WeightBytes
from lingualinked.workload import Workload

Spans: TypeAlias = tuple[tuple[str, int, int], ...]
"""Device, start and end of each stage of a plan, in pipeline order."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What layers take of memory, and what devices have."""

    weights: WeightBytes
    devices: tuple[Device, ...]
    capacity_bytes: tuple[float, ...]  # of each device; infinite if it is not known
    layer_kv: tuple[int, ...] = ()  # bytes of each layer's KV of all sessions; empty if not known
    working: int = 0  # bytes of a stage's intermediate results
    transmission: Transmission = dataclasses.field(default_factory=Transmission)

    @classmethod
    def of_profile(cls, profile: Profile, workload: Workload) -> Holdings:
        """Make holdings from a profile, with a workload's KV and steps; what plans leave free may be used while layers move."""
        model, costs = profile.model, WorkloadCosts(profile, workload, 0.0)
        return cls(
            weights=model.weights,
            devices=tuple(each.device for each in profile.devices),
            capacity_bytes=tuple(costs.capacity_bytes(each) for each in profile.devices),
            layer_kv=tuple(map(costs.layer_kv_bytes, range(model.num_layers))),
            working=costs.working_bytes(),
            transmission=model.transmission,
        )

    @classmethod
    def of_devices(
        cls, weights: WeightBytes, devices: Sequence[Device], transmission: Transmission | None = None
    ) -> Holdings:
        """Make holdings from the devices' own limits and the weights alone, where nothing was measured."""
        limits = (device.memory_bytes for device in devices)
        return cls(
            weights=weights,
            devices=tuple(devices),
            capacity_bytes=tuple(math.inf if limit is None else limit for limit in limits),
            transmission=transmission or Transmission(),
        )


class Ledger:
    """Bytes that devices hold under plans, and their limits while layers move from the plan `origin` to another.

    A device that exceeds its memory before anything has moved may hold so much, and no more. A stage may begin or end at any of
    the `bounds`.
    """

    def __init__(self, holdings: Holdings, origin: Spans) -> None:
        self._weights, self._working = holdings.weights, holdings.working
        self._num_layers = len(holdings.weights.layers)
        forbidden = holdings.transmission.forbidden_cuts
        self.bounds = [layer for layer in range(self._num_layers + 1) if layer not in forbidden]
        kv = holdings.layer_kv or (0,) * self._num_layers
        layers = zip(holdings.weights.layers, kv, strict=True)
        self._before = [0, *accumulate(weight + each for weight, each in layers)]  # bytes of the layers before each
        devices = zip(holdings.devices, holdings.capacity_bytes, strict=True)
        self.limits = {device.name: max(capacity, self.held_bytes(device.name, origin)) for device, capacity in devices}

    def held_bytes(self, device: str, *plans: Spans) -> int:
        """Return the bytes that a device holds that is part of all these plans at once; what they share counts once."""
        spans = sorted((start, end) for plan in plans for name, start, end in plan if name == device)
        if not spans:
            return 0
        num_bytes = reached = 0
        for start, end in spans:
            if end > reached:
                num_bytes += self._before[end] - self._before[max(start, reached)]
                reached = end
        num_bytes += self._weights.of_ends(has_first=spans[0][0] == 0, has_last=reached == self._num_layers)
        num_stages = max(sum(name == device for name, _, _ in plan) for plan in plans)
        return num_bytes + (self._working + self._weights.everywhere) * num_stages

    def fit(self, *plans: Spans) -> bool:
        """Whether all devices can hold their parts of these plans at once."""
        devices = {name for plan in plans for name, _, _ in plan}
        return all(self.held_bytes(name, *plans) <= self.limits[name] for name in devices)

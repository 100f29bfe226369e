"""Whether a model fits on devices at all, from its bytes alone: asked before anything is measured.

Knows bytes and limits; times do not matter here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lingualinked.device import Device, Links
from lingualinked.planning.estimate import DeviceSpecs, LayerOperations, roofline_profile
from lingualinked.planning.planner import solve
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import ModelProfile, Profile
from lingualinked.workload import Workload

_ANY = DeviceSpecs(flops="1TFLOP/s", memory_bandwidth="100GB/s")  # what fits does not depend on it


def check_fits(
    model: ModelProfile,
    devices: Sequence[Device],
    links: Links,
    workload: Workload,
    *,
    free_bytes: Mapping[str, int],
    reserve: float,
) -> None:
    """Refuse a model that no plan could place, with the error of `solve`; free bytes are by device, if known."""
    operations = [LayerOperations(attention_flops=0.0) for _ in model.kinds]
    stated = {device.name: _ANY for device in devices}
    profile = roofline_profile(model, operations, devices, stated, links=links, workload=workload)
    profile = dataclasses.replace(
        profile,
        devices=tuple(
            dataclasses.replace(each, free_bytes=free_bytes.get(each.device.name)) for each in profile.devices
        ),
    )
    if not _surely_fits(profile, WorkloadCosts(profile, workload, reserve)):
        solve(profile, workload=workload, reserve=reserve)


def _surely_fits(profile: Profile, costs: WorkloadCosts) -> bool:
    """Say whether devices filled one after the other, each until the next layer does not fit, hold the model for sure."""
    model = profile.model
    any_trusted = any(each.device.trusted for each in profile.devices)
    if any_trusted and any(not each.device.trusted for each in profile.devices):
        return all(math.isinf(costs.capacity_bytes(each)) for each in profile.devices)
    largest = max(weight + costs.layer_kv_bytes(i) for i, weight in enumerate(model.layer_weight_bytes))
    spare = largest + model.prologue_bytes + model.epilogue_bytes + costs.working_bytes()
    held = sum(max(0.0, costs.capacity_bytes(each) - spare) for each in profile.devices)
    return held >= sum(model.layer_weight_bytes) + costs.kv_bytes(0, model.num_layers)

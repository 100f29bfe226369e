"""Whether a model fits on devices at all, from its bytes alone: asked before anything is measured.

Knows bytes and limits; times do not matter here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lingualinked.device import Device, Links
from lingualinked.device_specs import DeviceSpecs
from lingualinked.planning.estimate import LayerOperations, roofline_profile
from lingualinked.planning.planner import solve
from lingualinked.planning.remedy import model_fits
from lingualinked.profile import ModelProfile
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
    if not model_fits(profile, workload, reserve):
        solve(profile, workload=workload, reserve=reserve)

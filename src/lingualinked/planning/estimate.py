"""A profile from stated figures instead of measurements: to plan for devices that are not there yet.

Knows a model in bytes and what devices are said to do; nothing is run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from lingualinked.device import CALLER, Device, Links, check_links, link_between, parse_rate
from lingualinked.errors import ArgumentError
from lingualinked.profile import DeviceProfile, LinkProfile, ModelProfile, ModuleTimes, Profile, StepTime
from lingualinked.workload import Workload

_FLOPS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)FLOP(?:/s|S|s)\s*", re.ASCII)
_ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
_HOP_LATENCY_S = 5e-4  # of handling a message at both ends, about
_STAGE_S = 1e-3  # of what a stage does besides its layers, about


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a device is said to do.

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
                raise ArgumentError(f"flops={self.flops!r} is no rate: write a number, or 2TFLOP/s")
            return float(match[1]) * 1000.0 ** " KMGTP".index(match[2] or " ")
        if isinstance(self.flops, bool) or not isinstance(self.flops, int | float):
            raise ArgumentError(f"flops={self.flops!r} is no rate: write a number, or 2TFLOP/s")
        try:
            return float(self.flops)
        except OverflowError:
            return math.inf

    @property
    def memory_bytes_per_s(self) -> float:
        """Bytes per second."""
        return parse_rate(self.memory_bandwidth, "memory_bandwidth")


def roofline_profile(
    model: ModelProfile,
    devices: Sequence[Device],
    figures: Mapping[str, Figures],
    *,
    links: Links | None = None,
    workload: Workload | None = None,
) -> Profile:
    """Estimate a profile by the roofline model: a step takes as long as its operations, or as reading what it needs.

    Parameters
    ----------
    model : ModelProfile
        The model in bytes.
    devices : sequence of Device
        With memory, bandwidth and latency as they are said to be.
    figures : mapping of str to Figures
        For each device, by name.
    links : mapping of (str, str) to Link, optional
        Links that are other than what their two ends give.
    workload : Workload or None
        Tells the shapes; ``None``: the default one.

    Returns
    -------
    Profile
        With no versions, since nothing was measured.

    Raises
    ------
    ArgumentError
        If there is no device, a name occurs twice, figures are missing, or a link leads to no device.

    References
    ----------
    S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model for multicore
    architectures", Communications of the ACM 52(4), 2009.
    """
    links = check_links(links or {}, [device.name for device in devices])
    by_name: dict[str, Device | None] = {CALLER: None}
    profiles = []
    for device in devices:
        if device.name not in figures:
            raise ArgumentError(f"figures are missing for device {device.name!r}")
        by_name[device.name] = device
        profiles.append(_device_profile(model, device, figures[device.name], workload or Workload()))
    link_profiles = []
    for source, target in itertools.permutations(by_name, 2):
        link = link_between(by_name[source], by_name[target], links)
        rate = link.bandwidth_bytes_per_s
        link_profiles.append(
            LinkProfile(
                source=source,
                target=target,
                latency_s=link.latency_s + _HOP_LATENCY_S,
                bandwidth_bytes_per_s=None if rate == math.inf else rate,
            )
        )
    return Profile(model=model, devices=tuple(profiles), links=tuple(link_profiles))


def _device_profile(model: ModelProfile, device: Device, figures: Figures, workload: Workload) -> DeviceProfile:
    item_bytes = _ITEM_BYTES.get(model.dtype, 2)

    def times(weight_bytes: int, kv_bytes: int) -> ModuleTimes:
        steps = []
        prompt, batch = max(2, workload.prompt_tokens), workload.batch_size
        shapes = [(prompt, 0), (1, workload.prompt_tokens), (1, workload.num_tokens)]
        for rows, (tokens, context) in itertools.product(sorted({1, batch}), shapes):
            # Attention multiplies every new token with all keys and values that it sees.
            seen = context + tokens / 2
            flops = 2 * rows * tokens * (weight_bytes + kv_bytes * seen) / item_bytes
            moved = weight_bytes + rows * kv_bytes * (context + tokens)
            seconds = max(flops / figures.flops_per_s, moved / figures.memory_bytes_per_s) * device.slowdown
            steps.append(StepTime(rows=rows, tokens=tokens, context=context, seconds=seconds))
        return ModuleTimes(tuple(steps))

    first = [model.kind_of_layer.index(kind) for kind in range(len(model.kinds))]
    zero = ModuleTimes((StepTime(rows=1, tokens=1, context=0, seconds=0.0),))
    return DeviceProfile(
        device=device,
        hardware="stated figures",
        layers=tuple(times(model.layer_weight_bytes[i], model.layer_kv_bytes[i]) for i in first),
        stage=ModuleTimes((StepTime(rows=1, tokens=1, context=0, seconds=_STAGE_S * device.slowdown),)),
        prologue=zero,
        epilogue=_one_token(times(model.epilogue_bytes, 0)),
    )


def _one_token(times: ModuleTimes) -> ModuleTimes:
    """Have every step cost what a decode step does: only the last position's logits are computed."""
    return ModuleTimes(tuple(step for step in times.steps if step.tokens == 1))

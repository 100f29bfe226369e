"""Estimates a profile from stated device specifications, to plan for devices that are not there yet.

Knows a model in bytes and operations; runs and measures nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from lingualinked.device import CALLER, Device, Links, check_links, link_between
from lingualinked.device_specs import DeviceSpecs
from lingualinked.errors import ArgumentError
from lingualinked.link_profile import LinkProfile
from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.profile import DeviceProfile, ModelProfile, Profile
from lingualinked.workload import Workload

_ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
HOP_LATENCY_S = 5e-4
"""Seconds that handling a message takes at both ends, about: what a stated latency does not include."""
_STAGE_S = 1e-3  # of what a stage does besides its layers in any step, about
_LENGTHS = tuple(2**exponent for exponent in range(1, 18))  # for which times are stated, besides the workload's own


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerOperations:
    """What the weights of a layer do not tell of its operations."""

    attention_flops: float  # of all query heads, per new token and token that it attends to
    expert_bytes: int = 0  # of all routed experts; 0 for a dense layer
    expert_share: float = 1.0  # of the routed experts, that one token goes through


def roofline_profile(
    model: ModelProfile,
    operations: Sequence[LayerOperations],
    devices: Sequence[Device],
    specs: Mapping[str, DeviceSpecs],
    *,
    links: Links | None = None,
    workload: Workload | None = None,
) -> Profile:
    """Estimate a profile by the roofline model: a step takes as long as its operations, or as reading what it needs.

    ``operations`` are those of one layer of each kind of the model. The profile has no versions, since nothing was measured.

    References
    ----------
    S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model for multicore
    architectures", Communications of the ACM 52(4), 2009.
    """
    links = check_links(links or {}, [device.name for device in devices])
    workload = model.fit_workload(workload)
    by_name: dict[str, Device | None] = {CALLER: None}
    profiles = []
    for device in devices:
        if device.name not in specs:
            raise ArgumentError(f"specs are missing for device {device.name!r}")
        by_name[device.name] = device
        profiles.append(_device_profile(model, operations, device, specs[device.name], workload))
    link_profiles = []
    for source, target in itertools.permutations(by_name, 2):
        link = link_between(by_name[source], by_name[target], links)
        rate = link.bandwidth_bytes_per_s
        link_profiles.append(
            LinkProfile(
                source=source,
                target=target,
                latency_s=link.latency_s + HOP_LATENCY_S,
                bandwidth_bytes_per_s=None if rate == math.inf else rate,
            )
        )
    return Profile(model=model, devices=tuple(profiles), links=tuple(link_profiles))


def roofline_specs(
    model: ModelProfile, operations: LayerOperations, times: ModuleTimes, slowdown: float = 1.0
) -> DeviceSpecs:
    """Return the rates with which the roofline model gives the measured times of a model's first kind of layer.

    Prefill, with all its tokens, is limited by operations, and a decode step by memory. A device that emulates a slower one
    has the rates of its processor.
    """
    prefill = max(times.steps, key=lambda step: step.tokens)
    decode = min(times.steps, key=lambda step: (step.tokens, step.context))
    flops, _ = _layer_needs(model, operations, 0, prefill.rows, prefill.tokens, prefill.context)
    _, num_bytes = _layer_needs(model, operations, 0, decode.rows, decode.tokens, decode.context)
    return DeviceSpecs(flops=slowdown * flops / prefill.seconds, memory_bandwidth=slowdown * num_bytes / decode.seconds)


def _device_profile(
    model: ModelProfile, operations: Sequence[LayerOperations], device: Device, specs: DeviceSpecs, workload: Workload
) -> DeviceProfile:
    batches = sorted({1, workload.batch_size})

    def step_s(flops: float, num_bytes: float) -> float:
        return max(flops / specs.flops_per_s, num_bytes / specs.memory_bytes_per_s) * device.slowdown

    def layer(kind: int) -> ModuleTimes:
        index = model.kind_of_layer.index(kind)
        window = model.layer_windows[index]
        own = (workload.prompt_tokens, workload.num_tokens)  # first, as they are what is shown
        lengths = dict.fromkeys((*own, *_LENGTHS, *([] if window is None else [window])))
        shapes = [(tokens, 0) for tokens in lengths if tokens > 1] + [(1, context) for context in (*lengths, 0)]
        return ModuleTimes(
            tuple(
                StepTime(
                    rows=rows,
                    tokens=tokens,
                    context=context,
                    seconds=step_s(*_layer_needs(model, operations[kind], index, rows, tokens, context)),
                )
                for rows, (tokens, context) in itertools.product(batches, shapes)
            )
        )

    def constant(seconds: Mapping[int, float]) -> ModuleTimes:
        """State what a step of so many rows takes, however many tokens it has."""
        return ModuleTimes(
            tuple(StepTime(rows=rows, tokens=1, context=0, seconds=each) for rows, each in seconds.items())
        )

    # Only the last position's logits are computed.
    num_head_flops = 2 * model.epilogue_bytes / _item_bytes(model)
    return DeviceProfile(
        device=device,
        hardware="stated specs",
        layers=tuple(layer(kind) for kind in range(len(model.kinds))),
        stage=constant({1: _STAGE_S * device.slowdown}),
        prologue=constant({1: 0.0}),
        epilogue=constant({rows: step_s(rows * num_head_flops, model.epilogue_bytes) for rows in batches}),
    )


def _layer_needs(
    model: ModelProfile, operations: LayerOperations, layer: int, rows: int, tokens: int, context: int
) -> tuple[float, float]:
    """Count the operations of a step in a layer, and the bytes that it reads and writes."""
    window = model.layer_windows[layer]
    experts, share = operations.expert_bytes, operations.expert_share
    dense = model.layer_weight_bytes[layer] - experts
    # Every weight is multiplied once and added once for each token that goes through it.
    flops = 2 * rows * tokens * (dense + share * experts) / _item_bytes(model)
    flops += operations.attention_flops * rows * _num_attended(tokens, context, window)
    # Tokens choose their experts independently of each other: so many of them are chosen by one at least.
    weights = dense + experts * (1 - (1 - share) ** (rows * tokens))
    kept = context if window is None else min(context, window)
    state = 2 * model.layer_state_bytes[layer]  # read and written
    return flops, weights + rows * (model.layer_kv_bytes[layer] * (kept + tokens) + state)


def _num_attended(tokens: int, context: int, window: int | None) -> int:
    """Count the tokens that new ones attend to: each to all before it and itself, or to the last of them within a window."""
    num_growing = tokens if window is None else min(tokens, max(0, window - context))
    growing = num_growing * context + num_growing * (num_growing + 1) // 2
    return growing + (tokens - num_growing) * (window or 0)


def _item_bytes(model: ModelProfile) -> int:
    return _ITEM_BYTES.get(model.dtype, 2)

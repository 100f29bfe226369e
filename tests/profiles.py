"""Profiles for tests: a small model on devices of stated speeds, without measuring anything."""

from __future__ import annotations

import itertools

import lingualinked as ll
from lingualinked.device import CALLER
from lingualinked.link_profile import LinkProfile
from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.profile import DeviceProfile, ModelProfile, Profile

MIB = 1024**2


def times(seconds: float, *, per_token: float | None = None) -> ModuleTimes:
    """A part that takes so long in a decode step, and so much per token of a prefill (the same by default)."""
    per_token = seconds / 10 if per_token is None else per_token
    steps = [
        StepTime(rows=rows, tokens=tokens, context=context, seconds=each)
        for rows in (1, 4)
        for tokens, context, each in [
            (1, 0, seconds),
            (1, 1000, 2 * seconds),
            (64, 0, 64 * per_token * rows),
            (128, 0, 128 * per_token * rows),
        ]
    ]
    return ModuleTimes(tuple(steps))


def model_profile(num_layers: int = 8, *, layer_bytes: int = 10 * MIB, fingerprint: str = "small") -> ModelProfile:
    return ModelProfile(
        name="small",
        fingerprint=fingerprint,
        dtype="float32",
        kinds=("Layer",),
        kind_of_layer=(0,) * num_layers,
        layer_weight_bytes=(layer_bytes,) * num_layers,
        layer_kv_bytes=(1024,) * num_layers,
        layer_windows=(None,) * num_layers,
        prologue_bytes=4 * MIB,
        epilogue_bytes=5 * MIB,
        tied_bytes=3 * MIB,
        hidden_bytes=2048,
        logits_bytes=40_000,
        working_bytes=8192,
    )


def profile(*devices: ll.Device, layer_s: float = 1e-3, num_layers: int = 8, latency_s: float = 1e-4) -> Profile:
    """A profile in which a layer takes ``layer_s`` times the device's slowdown."""
    devices = devices or (ll.Device(name="a"), ll.Device(name="b", slowdown=2.0))
    names = [CALLER, *(device.name for device in devices)]
    by_name = {device.name: device for device in devices}

    def link(source: str, target: str) -> LinkProfile:
        ends = [by_name[name] for name in (source, target) if name in by_name]
        rate = min(end.bandwidth_bytes_per_s for end in ends)
        return LinkProfile(
            source=source,
            target=target,
            latency_s=latency_s + sum(end.latency_s for end in ends),
            bandwidth_bytes_per_s=None if rate == float("inf") else rate,
        )

    return Profile(
        model=model_profile(num_layers),
        devices=tuple(
            DeviceProfile(
                device=device,
                hardware="stated",
                layers=(times(layer_s * device.slowdown),),
                stage=times(layer_s / 10 * device.slowdown, per_token=0.0),
                prologue=times(layer_s / 20 * device.slowdown, per_token=0.0),
                epilogue=times(layer_s / 2 * device.slowdown, per_token=0.0),
            )
            for device in devices
        ),
        links=tuple(link(source, target) for source, target in itertools.permutations(names, 2)),
    )

"""Formats a profile as a table: the time of each part of a model on each device, and its spread.

Knows profiles; not how they are measured.
"""

from __future__ import annotations

from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.profile import DeviceProfile, ModelProfile, Profile
from lingualinked.quantities import bytes_text, count_text, seconds_text
from lingualinked.tables import Rows


def profile_rows(profile: Profile) -> Rows:
    """Make a table of a profile: the parts of each device, with the first prefill and decode step of the largest batch."""
    model = profile.model
    rows = [row for device in profile.devices for row in _device_rows(model, device)]
    slowest = max(profile.links, key=lambda link: link.latency_s)
    measured = "measured" if profile.versions else "from stated specs"
    return Rows(
        title=f"Profile of {model.name}: {count_text(model.num_layers, 'layer')}, {model.dtype}, {measured}",
        columns=("device", "part", "number", "prefill", "spread", "decode", "spread"),
        rows=rows,
        notes=[
            f"Shapes: {_shapes(profile)} (rows x new tokens, after tokens in the KV cache)",
            f"Longest latency: {seconds_text(slowest.latency_s)}, from {slowest.source} to {slowest.target}",
            *_power_notes(profile),
            *doubt_notes(profile),
        ],
    )


def doubt_notes(profile: Profile) -> list[str]:
    """Return a note that says why a profile is doubtful, and what corrects it; none if it is not."""
    if not profile.doubt:
        return []
    return [f"Doubtful: {profile.doubt}; it is not kept on disk, and the first requests of a model correct it"]


def _power_notes(profile: Profile) -> list[str]:
    """Return a note with the known powers of devices, and whether they were measured."""
    known = [(each, each.watts) for each in profile.devices if each.watts is not None]
    if not known:
        return []
    drawn = (
        f"{each.device.name} {watts:.3g} W ({f'measured: {each.power_source}' if each.device.watts is None else 'given'})"
        for each, watts in known
    )
    return [f"Power while computing: {', '.join(drawn)}"]


def _device_rows(model: ModelProfile, device: DeviceProfile) -> list[tuple[str, ...]]:
    name = device.device.name
    capacity = device.capacity_bytes
    memory = "" if capacity == float("inf") else f" ({bytes_text(capacity)} free)"
    parts = [
        *((kind, model.kind_of_layer.count(i), device.layers[i]) for i, kind in enumerate(model.kinds)),
        ("stage", 1, device.stage),
        ("prologue", 1, device.prologue),
        ("epilogue", 1, device.epilogue),
    ]
    return [
        (f"{name}{memory}" if not index else "", part, str(count), *_cells(times))
        for index, (part, count, times) in enumerate(parts)
    ]


def _cells(times: ModuleTimes) -> tuple[str, ...]:
    cells: list[str] = []
    for is_decode in (False, True):
        step = _shown_step(times, is_decode=is_decode)
        cells += ("", "") if step is None else (seconds_text(step.seconds), seconds_text(step.spread_s))
    return tuple(cells)


def _shown_step(times: ModuleTimes, *, is_decode: bool) -> StepTime | None:
    steps = [step for step in times.steps if (step.tokens == 1) == is_decode]
    return max(steps, key=lambda step: step.rows, default=None)


def _shapes(profile: Profile) -> str:
    steps = [_shown_step(profile.devices[0].layers[0], is_decode=each) for each in (False, True)]
    return ", ".join(f"{step.rows} x {step.tokens} after {step.context}" for step in steps if step is not None)

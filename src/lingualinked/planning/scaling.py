"""A device as it would be if all parts of the model took other times there.

Knows profiles; not why a device is faster or slower.
"""

from __future__ import annotations

import dataclasses

from lingualinked.module_times import ModuleTimes
from lingualinked.profile import DeviceProfile


def scale_times(device: DeviceProfile, *, prefill: float, decode: float) -> DeviceProfile:
    """Multiply the times of all parts, those of steps of one token per row by ``decode``."""

    def times(part: ModuleTimes) -> ModuleTimes:
        return ModuleTimes(
            tuple(
                dataclasses.replace(step, seconds=step.seconds * (decode if step.tokens == 1 else prefill))
                for step in part.steps
            )
        )

    return dataclasses.replace(
        device,
        layers=tuple(map(times, device.layers)),
        stage=times(device.stage),
        prologue=times(device.prologue),
        epilogue=times(device.epilogue),
    )

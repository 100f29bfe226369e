"""How the machine under a worker is: processor time, memory, temperature, battery.

Knows what the operating system tells; not what the worker does.
"""

from __future__ import annotations

import dataclasses

import psutil

from lingualinked.worker.limits import free_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VitalSigns:
    """One look, in the words of `lingualinked.telemetry.samples.DeviceSample`."""

    available_bytes: int
    cpu_percent: float
    temperature_c: float | None
    battery_percent: float | None
    on_battery: bool


class Vitals:
    """Looks at the machine, over and over.

    Parameters
    ----------
    accelerator : str
        What the worker computes on.
    memory_bytes : int or None
        Limit on what its stages may hold; ``None``: none of its own.
    """

    def __init__(self, accelerator: str, memory_bytes: int | None) -> None:
        self._accelerator = accelerator
        self._memory_bytes = memory_bytes
        self._process = psutil.Process()
        self._process.cpu_percent(None)  # the first call only starts its clock

    def look(self, held_bytes: int) -> VitalSigns:
        """Look now, given what the stages hold."""
        available = free_bytes(self._accelerator)
        if self._memory_bytes is not None:
            available = min(available, max(0, self._memory_bytes - held_bytes))
        percent, on_battery = _battery()
        return VitalSigns(
            available_bytes=available,
            cpu_percent=self._process.cpu_percent(None),
            temperature_c=_temperature_c(),
            battery_percent=percent,
            on_battery=on_battery,
        )


def _temperature_c() -> float | None:
    """Give what the hottest sensor says; None where there is none."""
    if not hasattr(psutil, "sensors_temperatures"):  # Linux and FreeBSD have it
        return None
    try:
        sensors = psutil.sensors_temperatures()
    except (OSError, RuntimeError):  # a sensor that can't be read
        return None
    # Some sensors say 0 or less where they measure nothing.
    values = [each.current for group in sensors.values() for each in group if each.current and each.current > 0]
    return max(values, default=None)


def _battery() -> tuple[float | None, bool]:
    """Give the charge in per cent, None where there is no battery, and whether the machine runs from it."""
    if not hasattr(psutil, "sensors_battery"):
        return None, False
    try:
        battery = psutil.sensors_battery()
    except (OSError, RuntimeError):
        return None, False
    if battery is None:
        return None, False
    return float(battery.percent), battery.power_plugged is False

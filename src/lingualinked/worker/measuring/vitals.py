"""The state of a worker's machine: processor time, memory, temperature, battery.

Knows what the operating system reports; not what the worker does.
"""

from __future__ import annotations

import psutil

from lingualinked.telemetry.samples import DeviceSample
from lingualinked.worker.process.limits import free_bytes


class Vitals:
    """Reads the state of the machine; `memory_bytes` limits what the stages may hold (``None``: no limit)."""

    def __init__(self, accelerator: str, memory_bytes: int | None) -> None:
        self._accelerator = accelerator
        self._memory_bytes = memory_bytes
        self._process = psutil.Process()
        self._process.cpu_percent(None)  # the first call only starts its clock

    def read_vitals(self, held_bytes: int) -> DeviceSample:
        """Read the state now, given the bytes that the stages hold."""
        available = free_bytes(self._accelerator)
        if self._memory_bytes is not None:
            available = min(available, max(0, self._memory_bytes - held_bytes))
        percent, on_battery = _battery()
        return DeviceSample(
            time_s=0.0,  # this and the name are for the caller to fill in
            device="",
            held_bytes=held_bytes,
            available_bytes=available,
            cpu_percent=self._process.cpu_percent(None),
            temperature_c=_temperature_c(),
            battery_percent=percent,
            on_battery=on_battery,
        )


def _temperature_c() -> float | None:
    """Return the temperature of the hottest sensor; None if there is none."""
    if not hasattr(psutil, "sensors_temperatures"):  # Linux and FreeBSD have it
        return None
    try:
        sensors = psutil.sensors_temperatures()
    except (OSError, RuntimeError):  # a sensor that can't be read
        return None
    # Some sensors report 0 or less when they measure nothing.
    values = [each.current for group in sensors.values() for each in group if each.current and each.current > 0]
    return max(values, default=None)


def _battery() -> tuple[float | None, bool]:
    """Return the charge in per cent (None without a battery), and whether the machine runs on battery."""
    if not hasattr(psutil, "sensors_battery"):
        return None, False
    try:
        battery = psutil.sensors_battery()
    except (OSError, RuntimeError):
        return None, False
    if battery is None:
        return None, False
    return float(battery.percent), battery.power_plugged is False

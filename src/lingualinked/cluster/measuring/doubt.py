"""Judges whether measured times can be trusted: by how far repeats lie apart, and by what else the machine computed.

Knows processes' CPU time and profiles; measures no model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Self

import psutil

from lingualinked.profile import DeviceProfile, ModelProfile

_SPREAD = 0.5  # of a step's time between its quartiles, beyond which it is doubtful
_LEAST_SPREAD_S = 1e-3  # of a whole step, that does not matter
_LEAST_CORES = 0.3  # of other processes, that do not matter; CPU time is counted in hundredths of a second


class OtherWork:
    """Counts the cores that processes other than ``pids`` and this one keep busy while it is open; a context manager."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = (*pids, os.getpid())
        self._began_s = self._own_s = self._all_s = 0.0
        self.num_cores = 0.0

    def __enter__(self) -> Self:
        self._began_s, self._own_s, self._all_s = time.monotonic(), self._own_cpu_s(), _all_cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = max(time.monotonic() - self._began_s, 1e-3)
        others_s = _all_cpu_s() - self._all_s - (self._own_cpu_s() - self._own_s)
        self.num_cores = max(0.0, others_s / seconds)

    def _own_cpu_s(self) -> float:
        seconds = 0.0
        for pid in self._pids:
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.Error:  # it has ended
                continue
            seconds += times.user + times.system
        return seconds


def find_doubt(model: ModelProfile, devices: Sequence[DeviceProfile], here: Collection[str], other_cores: float) -> str:
    """Explain why times can't be trusted; an empty text if they can.

    Processes other than workers kept ``other_cores`` of this machine busy, which the devices ``here`` have measured on; of
    other machines that is not known.
    """
    reasons = []
    num_cores = psutil.cpu_count() or 1
    local = [each.device for each in devices if each.device.name in here]
    needed = sum((device.threads or 1) if device.accelerator == "cpu" else 1 for device in local)
    if local and other_cores > max(0, num_cores - needed) + _LEAST_CORES:
        reasons.append(f"other processes kept {other_cores:.1f} of {num_cores} cores busy")
    for phase in ("prefill", "decode step"):
        names: dict[str, list[str]] = {}  # by how far they spread: devices that are alike are measured once
        for each in devices:
            seconds, spread_s = each.whole_step_s(model, is_decode=phase == "decode step")
            if spread_s > max(_SPREAD * seconds, _LEAST_SPREAD_S):
                names.setdefault(f"{100 * spread_s / seconds:.0f} %", []).append(repr(each.device.name))
        for share, those in names.items():
            noun = "device" if len(those) == 1 else "devices"
            reasons.append(f"the repeats of a {phase} on {noun} {', '.join(those)} spread by {share}")
    return "; ".join(reasons)


def _all_cpu_s() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))

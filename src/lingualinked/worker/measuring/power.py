"""How much power a worker draws: what the machine's energy counters say, by the worker's share of the work.

Knows the counters of processors (RAPL) and of NVIDIA's GPUs (NVML); not what is computed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil

POWERCAP = Path("/sys/class/powercap")
"""Where Linux lists RAPL's counters."""


class UnknownPowerError(Exception):
    """What a device draws can't be measured; the message says why."""


class EnergyCounter(Protocol):
    """Counts the energy of one worker."""

    source: str  # what counts, in a few words

    def start(self) -> None:
        """Begin to count, or raise `UnknownPowerError` if it can't be read any more."""

    def stop(self) -> float:
        """Return the joules since `start`, or raise as it does."""


class PowerMeter:
    """Mean power of a worker over all stretches of computing that are measured.

    Seconds are counted as those of the steps: an emulated device that is slower draws as much less as it takes longer.
    """

    def __init__(self, counter: EnergyCounter | UnknownPowerError, clock: Callable[[], float]) -> None:
        self._counter = counter
        self._clock = clock
        self._joules = self._seconds = 0.0

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Count what is computed in a ``with`` block."""
        counter = self._counter
        if isinstance(counter, UnknownPowerError):
            yield
            return
        with self._giving_up():
            counter.start()
        began_s = self._clock()
        yield
        seconds = self._clock() - began_s
        with self._giving_up():
            self._joules += counter.stop()
            self._seconds += seconds

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Measure nothing more once a counter can't be read."""
        try:
            yield
        except UnknownPowerError as error:
            self._counter = error.with_traceback(None)

    def result(self) -> tuple[float | None, str]:
        """Return watts and their source; ``None``, and why, where they can't be known."""
        if isinstance(self._counter, UnknownPowerError):
            return None, str(self._counter)
        if self._joules <= 0 or self._seconds <= 0:
            return None, f"{self._counter.source} has counted no energy"
        return self._joules / self._seconds, self._counter.source


def find_counter(accelerator: str, folder: Path = POWERCAP) -> EnergyCounter | UnknownPowerError:
    """Return what counts the energy of a worker that computes there, or why nothing does."""
    try:
        if accelerator == "cpu":
            return RaplCounter(folder)
        if accelerator.startswith("cuda"):
            return NvmlCounter(accelerator)
    except UnknownPowerError as error:
        return error.with_traceback(None)  # its frames would keep alive what measures
    return UnknownPowerError(f"there is no energy counter for {accelerator}")


# --- processors


def cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds of this process, and of everything on this machine."""
    times = psutil.cpu_times()
    everything = times.user + times.system + sum(getattr(times, name, 0.0) for name in ("nice", "irq", "softirq"))
    return time.process_time(), everything


class RaplCounter:
    """A part of what the processors and their memory use: that of this process.

    A package's energy is that of all its cores and of whatever runs there, other workers too. It is attributed by CPU
    time: of the joules of all packages, a worker has the share that its CPU seconds are of all CPU seconds of the
    machine. What an idle package draws is thereby shared out in the same way. Of the domains within a package, cores
    and graphics are part of its count and are left out; memory (``dram``) is not, and is added. ``psys``, which
    contains the packages, is left out.

    See https://docs.kernel.org/power/powercap/powercap.html, and for what the domains contain: Intel 64 and IA-32
    Architectures Software Developer's Manual, volume 3B, section "Platform specific power management support".
    """

    source = "RAPL, by share of CPU time"

    def __init__(
        self, folder: Path = POWERCAP, read_cpu_seconds: Callable[[], tuple[float, float]] = cpu_seconds
    ) -> None:
        self._read_cpu_seconds = read_cpu_seconds
        zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _counts(zone)]
        if not zones:
            raise UnknownPowerError(f"{folder} lists no processor package: this machine has no RAPL, or hides it")
        self._ranges_uj = {zone: _read_uj(zone / "max_energy_range_uj") for zone in zones}
        self.start()  # raises if a counter may not be read

    def start(self) -> None:
        """Begin to count."""
        self._before_uj = self._energy_uj()
        self._cpu_before_s = self._read_cpu_seconds()

    def stop(self) -> float:
        """Return this process's joules since `start`."""
        after_uj = self._energy_uj()
        own_s, all_s = (now - then for now, then in zip(self._read_cpu_seconds(), self._cpu_before_s, strict=True))
        # A counter that has reached its range begins at 0 again.
        used_uj = sum(
            after - self._before_uj[zone] + (self._ranges_uj[zone] if after < self._before_uj[zone] else 0)
            for zone, after in after_uj.items()
        )
        # The machine's seconds come in hundredths, those of a process do not.
        share = min(1.0, own_s / all_s) if all_s > 0 else 1.0
        return share * used_uj / 1e6

    def _energy_uj(self) -> dict[Path, int]:
        return {zone: _read_uj(zone / "energy_uj") for zone in self._ranges_uj}


def _counts(zone: Path) -> bool:
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _read_uj(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnknownPowerError(f"{path} can't be read ({reason}): on most machines only root may") from error


# --- NVIDIA's GPUs


class NvmlCounter:
    """What a GPU uses, whoever computes there: workers that share one are each told all of it."""

    source = "NVML, of the whole GPU"

    def __init__(self, accelerator: str) -> None:
        import torch

        try:
            import pynvml
        except ImportError as error:
            raise UnknownPowerError("it takes nvidia-ml-py: pip install 'lingualinked[nvml]'") from error
        self._nvml: Any = pynvml
        # By UUID: CUDA_VISIBLE_DEVICES numbers devices otherwise than NVML does.
        uuid = torch.cuda.get_device_properties(accelerator).uuid
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            raise UnknownPowerError(f"NVML: {error}") from error
        self.start()  # raises if the driver does not count energy

    def start(self) -> None:
        """Begin to count."""
        self._before_mj = self._energy_mj()

    def stop(self) -> float:
        """Return the GPU's joules since `start`."""
        return (self._energy_mj() - self._before_mj) / 1e3

    def _energy_mj(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            raise UnknownPowerError(f"NVML: {error}") from error

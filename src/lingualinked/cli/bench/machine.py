"""The machine, the versions and the moment of a measurement.

Knows what the system reports; measures nothing.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import os
import subprocess
from pathlib import Path

import msgspec
import psutil

from lingualinked.processor import processor_name, usable_cores
from lingualinked.quantities import bytes_text, count_text

_LIBRARIES = ("torch", "transformers")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where and when a command has measured, and with what."""

    processor: str
    capability: str  # of torch: which instructions its kernels use
    num_cores: int
    memory_bytes: int
    accelerators: tuple[str, ...]
    versions: dict[str, str]
    commit: str  # of the checkout that the package is in, "" if it is in none
    date: str
    load_average: tuple[float, float]  # of the last minute, before and after

    def text(self) -> str:
        """Return it as a sentence or two."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        where = ", ".join(
            [
                f"{count_text(self.num_cores, 'core')} of {self.processor} ({self.capability})",
                f"{bytes_text(self.memory_bytes)} of memory",
                *self.accelerators,
            ]
        )
        commit = f" at commit {self.commit}" if self.commit else ""
        before, after = self.load_average
        return f"{where}; {versions}{commit}; {self.date}; load average {before:.1f} before and {after:.1f} after."


class MachineClock:
    """Notes the load average before a measurement; describes the machine after it."""

    def __init__(self) -> None:
        self._before = os.getloadavg()[0]

    def describe(self) -> Machine:
        """Return the description of this machine."""
        import torch

        accelerators = (
            [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            if torch.cuda.is_available()
            else []
        )
        return Machine(
            processor=processor_name(),
            capability=torch.backends.cpu.get_cpu_capability(),
            num_cores=usable_cores(),
            memory_bytes=psutil.virtual_memory().total,
            accelerators=tuple(accelerators),
            versions={name: importlib.metadata.version(name) for name in ("lingualinked", *_LIBRARIES)},
            commit=_commit(),
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            load_average=(round(self._before, 2), round(os.getloadavg()[0], 2)),
        )


def _commit() -> str:
    """Return the commit of the checkout that this file is in, with a + if files have changed since."""
    folder = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
        return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
    return ""

"""Finds out which processor this machine has, and how many of its cores this process may use.

Knows what the operating system reports, not what the processor can do.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

_DIFFERING = ("apicid", "bogomips", "BogoMIPS", "core id", "cpu MHz", "initial apicid", "physical id", "processor\t")


def processor_name() -> str:
    """Return the model of the processor, or its architecture if the system reports no model."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_processor() -> str:
    """Return all that the system reports of one core, without what changes and what differs between cores."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if not line.startswith(_DIFFERING))
    return processor_name()


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

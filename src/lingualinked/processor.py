"""Finds the name of this machine's processor.

Knows what the operating system reports, not what the processor can do.
"""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path


def processor_name() -> str:
    """Return the model of the processor, or its architecture if the system reports no model."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

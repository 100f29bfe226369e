"""Finds out what this process computes with: versions, processor, accelerator, threads.

Knows torch and what is installed; not what any of it means for results.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from lingualinked.environment import Environment
from lingualinked.host_id import host_id
from lingualinked.processor import processor_name
from lingualinked.versions import installed_versions


def read_environment(accelerator: str = "cpu") -> Environment:
    """Return what this process computes with on a processor, or on an accelerator if it is there."""
    return Environment(
        host=platform.node(),
        host_id=host_id(),
        machine=_machine(),
        versions=installed_versions(),
        processor=processor_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        accelerator=_accelerator_name(accelerator),
        threads=torch.get_num_threads(),
    )


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return platform.node()


def _accelerator_name(accelerator: str) -> str:
    kind, _, index = accelerator.partition(":")
    if kind == "cpu":
        return ""
    if kind == "cuda" and torch.cuda.is_available() and int(index) < torch.cuda.device_count():
        return torch.cuda.get_device_name(int(index))
    return accelerator  # where it is missing, loading a stage will raise

"""Finds the accelerators of this machine.

Knows what torch sees here, and what can be seen without it; not what is placed on them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from lingualinked.device import Device
from lingualinked.errors import ArgumentError
from lingualinked.quantities import count_text

_DEVICE_FILES = Path("/dev")
_NVIDIA = re.compile(r"nvidia\d+")
_OTHER_GPUS = ("dxg", "kfd", "nvmap", "nvhost-gpu")  # device files of WSL, ROCm and Tegra


def local_devices() -> list[Device]:
    """Return one device per accelerator that torch finds, else two CPU workers."""
    if _most_accelerators("cuda") != 0 or _most_accelerators("mps") != 0:
        import torch

        number = torch.cuda.device_count()  # `is_available` would initialise the driver in the user's process
        if number:
            return [Device(name=f"cuda-{index}", accelerator=f"cuda:{index}") for index in range(number)]
        if torch.backends.mps.is_available():
            return [Device(name="mps", accelerator="mps")]
    return [Device(name=f"worker-{index}") for index in range(2)]


def check_accelerator(device: Device) -> None:
    """Refuse a device whose accelerator this machine can't have.

    Torch is asked where it is loaded; else only what is sure without it is refused, and workers say the rest.
    """
    kind, _, index = device.accelerator.partition(":")
    if kind == "cpu":
        return
    number = _most_accelerators(kind)
    if number is None or int(index or 0) < number:
        return
    found = f"{count_text(number, 'accelerator')} of that kind" if number else "no accelerator of that kind"
    raise ArgumentError(
        f"accelerator={device.accelerator!r} of device {device.name!r}: this machine has {found} that torch can use; "
        "use 'cpu', or see what `lingualinked doctor` finds"
    )


def _most_accelerators(kind: str) -> int | None:
    """Return how many accelerators of a kind there are at most; ``None``: that is not known without torch."""
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "cuda") and hasattr(torch, "backends"):  # another thread may be about to import it
        return int(torch.cuda.device_count()) if kind == "cuda" else int(torch.backends.mps.is_available())
    if kind == "mps":
        return None if sys.platform == "darwin" else 0
    if sys.platform == "darwin":
        return 0
    if sys.platform != "linux" or any((_DEVICE_FILES / name).exists() for name in _OTHER_GPUS):
        return None
    return sum(_NVIDIA.fullmatch(node.name) is not None for node in _DEVICE_FILES.glob("nvidia*"))

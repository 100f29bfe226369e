"""Finds the accelerators of this machine.

Knows what torch sees here; not what is placed on it.
"""

from __future__ import annotations

from lingualinked.device import Device


def local_devices() -> list[Device]:
    """Return one device per accelerator that torch finds, else two CPU workers.

    Returns
    -------
    list of Device
        ``cuda:0``, ``cuda:1``, ...; or ``mps``; or two CPU devices.
    """
    import torch

    if torch.cuda.is_available():
        return [Device(name=f"cuda-{index}", accelerator=f"cuda:{index}") for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [Device(name="mps", accelerator="mps")]
    return [Device(name=f"worker-{index}") for index in range(2)]

"""The devices that a cluster is asked to run workers on, checked and filled in.

Knows this machine's cores; starts nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

from lingualinked.cluster.discovery import check_accelerator, local_devices
from lingualinked.device import Device
from lingualinked.errors import ArgumentError


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def as_devices(devices: int | Sequence[Device]) -> tuple[Device, ...]:
    """Return the devices that a cluster would have: so many local ones, or these, each with its number of threads."""
    if isinstance(devices, bool) or not isinstance(devices, int | Sequence) or isinstance(devices, str):
        raise ArgumentError(f"devices={devices!r} must be a number of local workers or a sequence of Device")
    if isinstance(devices, int):
        if devices < 1:
            raise ArgumentError(f"devices={devices} must be at least 1")
        devices = [Device(name=f"worker-{index}") for index in range(devices)]
    if not devices:
        raise ArgumentError("devices is empty: a cluster needs at least one")
    filled: list[Device] = []
    for device in devices:
        if not isinstance(device, Device):
            raise ArgumentError(f"devices holds {device!r}, which is not a lingualinked.Device")
        if any(device.name == other.name for other in filled):
            raise ArgumentError(f"two devices are named {device.name!r}: names must differ")
        _check_address(device, filled)
        filled.append(device)
    num_local = sum(device.address is None for device in filled)
    return tuple(_filled(device, num_local) for device in filled)


def check_added_device(device: Device, others: Sequence[Device]) -> Device:
    """Return the device that a cluster of others would have in addition, with its number of threads."""
    if not isinstance(device, Device):
        raise ArgumentError(f"device={device!r} is not a lingualinked.Device")
    names = [other.name for other in others]
    if device.name in names:
        raise ArgumentError(f"a device named {device.name!r} is in this cluster already ({names}): choose another name")
    _check_address(device, others)
    return _filled(device, 1 + sum(other.address is None for other in others))


def _check_address(device: Device, others: Sequence[Device]) -> None:
    for other in others:
        if device.address is not None and device.address == other.address:
            raise ArgumentError(
                f"devices {other.name!r} and {device.name!r} have one address, {device.address}: a daemon runs one worker for a "
                "caller; leave one of them out"
            )


def _filled(device: Device, num_local: int) -> Device:
    """Return a local device with its share of the cores as threads, unless it states their number."""
    if device.address is not None:
        return device  # its daemon knows its cores and accelerators
    _check_local(device)
    check_accelerator(device)
    share = max(1, usable_cores() // num_local)
    threads = device.threads or (share if device.cpus is None else len(device.cpus))
    return dataclasses.replace(device, threads=threads)


def _check_local(device: Device) -> None:
    if device.cpus is not None:
        if not hasattr(os, "sched_getaffinity"):
            raise ArgumentError(
                f"cpus of device {device.name!r}: this system can't pin a process to cores; leave it out"
            )
        foreign = sorted(set(device.cpus) - os.sched_getaffinity(0))
        if foreign:
            raise ArgumentError(
                f"cpus={device.cpus} of device {device.name!r}: cores {foreign} are not among those this process "
                f"may use ({sorted(os.sched_getaffinity(0))})"
            )


def asked_devices(devices: Literal["auto"] | int | Sequence[Device]) -> tuple[Device, ...]:
    """Return the devices of a cluster that is made for a model: those found here, so many local ones, or these."""
    if isinstance(devices, str):
        if devices != "auto":
            raise ArgumentError(
                f"devices={devices!r} must be 'auto', a number of local workers or a sequence of Device"
            )
        devices = local_devices()
    return as_devices(devices)

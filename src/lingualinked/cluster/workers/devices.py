"""The devices that a cluster is asked to run workers on, checked and filled in.

Knows this machine's cores; starts nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence

from lingualinked.address import parse_advertised
from lingualinked.checks import check_positive
from lingualinked.cluster_file import ClusterDescription, Devices, check_distinct, read_description
from lingualinked.device import Device, Links, check_links
from lingualinked.errors import ArgumentError
from lingualinked.processes.accelerators import check_accelerator, local_devices
from lingualinked.processor import usable_cores


def describe_cluster(
    devices: Devices, *, links: Links | None = None, advertise: str | None = None, timeout_s: float | None = None
) -> ClusterDescription:
    """Return what is said of a cluster that is to run on these devices, each local one with its number of threads.

    What is given beside the devices takes precedence over a cluster file. Raises ArgumentError for what can't be used.
    """
    if isinstance(devices, ClusterDescription):
        described = devices
    elif devices == "auto":
        described = ClusterDescription(devices=tuple(local_devices()))
    elif isinstance(devices, str | os.PathLike):
        described = read_description(devices)
    elif isinstance(devices, int) and not isinstance(devices, bool):
        if devices < 1:
            raise ArgumentError(f"devices={devices} must be at least 1")
        described = ClusterDescription(devices=tuple(Device(name=f"worker-{index}") for index in range(devices)))
    elif isinstance(devices, Sequence) and not isinstance(devices, str | bytes):
        described = ClusterDescription(devices=tuple(devices))
    else:
        raise ArgumentError(
            f"devices={devices!r} must be 'auto', a number of local workers, a sequence of Device, or a cluster file"
        )
    if not described.devices:
        raise ArgumentError("devices is empty: a cluster needs at least one")
    for number, device in enumerate(described.devices):
        if not isinstance(device, Device):
            raise ArgumentError(f"devices holds {device!r}, which is not a lingualinked.Device")
        check_distinct(device, described.devices[:number])
    num_local = sum(device.address is None for device in described.devices)
    filled = tuple(_filled(device, num_local) for device in described.devices)
    given = check_links(links or {}, [device.name for device in filled])
    if advertise is not None:
        parse_advertised(advertise, "advertise")
    if timeout_s is not None:
        check_positive(timeout_s, "timeout_s")
    described = dataclasses.replace(
        described,
        devices=filled,
        links={**described.links, **given},
        advertise=described.advertise if advertise is None else advertise,
        timeout_s=described.timeout_s if timeout_s is None else timeout_s,
    )
    check_relays(described.links, filled)
    return described


def check_relays(links: Links, devices: Sequence[Device]) -> None:
    """Check that each relay has a daemon, and that one end at least is on another machine."""
    remote = {device.name for device in devices if device.address is not None}
    for ends, link in links.items():
        if link.relay is None:
            continue
        if link.relay not in remote:
            raise ArgumentError(
                f"relay={link.relay!r} of the link {ends!r} is a local device, which has no daemon: choose from {sorted(remote)}"
            )
        if remote.isdisjoint(ends):
            raise ArgumentError(
                f"relay={link.relay!r} of the link {ends!r}: both ends are on this machine; leave it out"
            )


def check_added_device(device: Device, others: Sequence[Device], ended: Collection[str] = ()) -> Device:
    """Return the device that a cluster of others would have in addition, with its number of threads.

    The worker of a device that has ended leaves its address to another one, but not its name.
    """
    if not isinstance(device, Device):
        raise ArgumentError(f"device={device!r} is not a lingualinked.Device")
    names = [other.name for other in others]
    if device.name in names:
        raise ArgumentError(f"a device named {device.name!r} is in this cluster already ({names}): choose another name")
    check_distinct(device, [other for other in others if other.name not in ended])
    return _filled(device, 1 + sum(other.address is None for other in others))


def check_throttled(device: Device, bandwidth: object, latency: object) -> None:
    """Refuse to slow down the connections of a device with an address, which no one emulates."""
    for field, value in (("bandwidth", bandwidth), ("latency", latency)):
        if value is not None and device.address is not None:
            raise ArgumentError(
                f"{field}={value!r} has no effect on device {device.name!r} at {device.address}: its connections are as fast as "
                "they are; leave it out, or shape them on that host (`tc`)"
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

"""Where a device's worker is reached, and where it reaches this process.

Knows a device, what its daemon says, and this host's routes; no cluster.
"""

from __future__ import annotations

import socket

from lingualinked.address import Address, Advertised, parse_advertised
from lingualinked.cluster.reach import RemoteHost
from lingualinked.cluster.remote.connection import Lease
from lingualinked.cluster.remote.resolving import resolve_host
from lingualinked.device import Device
from lingualinked.errors import ArgumentError, DaemonError

_RESOLVE_S = 2.0


def locate(device: Device, lease: Lease) -> RemoteHost:
    """Return where a device's worker will be reached: as the device says, else as its daemon does, else where that is.

    Raises DaemonError if a host name is not found in time.
    """
    host = lease.address.host
    for text, field in ((device.advertise, "Device(advertise=)"), (lease.facts.advertise, "its --advertise")):
        if text is not None:
            host = parse_advertised(text, field).host
            try:
                host = resolve_host(host, _RESOLVE_S)
            except OSError as error:
                raise DaemonError(device.name, str(lease.address), f"{field} {text!r} {error}") from error
            break
    return RemoteHost(host_id=lease.facts.host_id, host=host, local_host=_local_host(lease.address))


def resolve_advertised(text: str | None) -> Advertised | None:
    """Parse where this process is reached, and look up the name of the host; raise ArgumentError if it is not found."""
    if text is None:
        return None
    advertised = parse_advertised(text, "advertise")
    try:
        return Advertised(resolve_host(advertised.host, _RESOLVE_S), advertised.ports)
    except OSError as error:
        raise ArgumentError(f"advertise={text!r} {error}") from error


def _local_host(daemon: Address) -> str:
    """Return the address of this host from which a daemon is reached."""
    family = socket.AF_INET6 if ":" in daemon.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing: it asks the kernel for the route
        probe.connect((daemon.host, daemon.port))
        host: str = probe.getsockname()[0]
        return host

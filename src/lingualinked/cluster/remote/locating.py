"""Where a device's worker is reached, and where it reaches this process.

Knows a device, what its daemon says, and this host's routes; no cluster.
"""

from __future__ import annotations

from lingualinked.address import Advertised, parse_advertised
from lingualinked.cluster.messaging.reach import RemoteHost
from lingualinked.cluster.remote.connection import Lease
from lingualinked.cluster.remote.resolving import resolve_host
from lingualinked.device import Device
from lingualinked.errors import ArgumentError, DaemonError
from lingualinked.transport.hosts.host_addresses import local_host_towards

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
    return RemoteHost(
        host_id=lease.facts.host_id, host=host, local_host=local_host_towards(lease.address.host, lease.address.port)
    )


def resolve_advertised(text: str | None) -> Advertised | None:
    """Parse where this process is reached, and look up the name of the host; raise ArgumentError if it is not found."""
    if text is None:
        return None
    advertised = parse_advertised(text, "advertise")
    try:
        return Advertised(resolve_host(advertised.host, _RESOLVE_S), advertised.ports)
    except OSError as error:
        raise ArgumentError(f"advertise={text!r} {error}") from error

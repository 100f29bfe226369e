"""Where a daemon is reached: host names are looked up here, within a bound, since libzmq gets numbers only.

Knows names and the errors of connecting; no keys and no messages.
"""

from __future__ import annotations

import concurrent.futures
import errno
import os
import socket
import threading

from lingualinked.address import Address, parse_address
from lingualinked.device import Device
from lingualinked.errors import DaemonError
from lingualinked.transport.hosts.host_addresses import look_up

PROBE_S = 1.0
"""Seconds that it takes at most to find out why an address can't be reached."""


def resolve_address(device: Device, timeout_s: float) -> Address:
    """Return the numeric address of a device's daemon, or raise DaemonError if its host name is not found in time."""
    assert device.address is not None
    address = parse_address(device.address, f"address of device {device.name!r}")
    try:
        return Address(resolve_host(address.host, timeout_s), address.port)
    except OSError as error:
        raise DaemonError(device.name, device.address, str(error)) from error


def resolve_host(host: str, timeout_s: float) -> str:
    """Return the numeric address of a host, or raise OSError with what went wrong and what to do."""
    found: concurrent.futures.Future[str] = concurrent.futures.Future()

    def resolve() -> None:
        try:
            found.set_result(look_up(host))
        except (OSError, UnicodeError) as error:
            found.set_exception(error)

    # Nothing can interrupt a look-up, and a name server may be silent for minutes.
    threading.Thread(target=resolve, name="resolving-lingualinked", daemon=True).start()
    try:
        return found.result(timeout_s)
    except concurrent.futures.TimeoutError:
        reason = f"no name server answered within {timeout_s:g} s"
    except (OSError, UnicodeError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)
    raise OSError(
        f"the host name {host!r} can't be resolved ({reason}): write its IP address, or mend /etc/hosts or the name server"
    )


def why_unreachable(address: Address) -> str:
    """Try to connect, and say why that fails and what to do; for an address at which no connection came about."""
    ask = f"see that `lingualinked worker --bind ...` runs there and listens at port {address.port}"
    try:
        socket.create_connection((address.host, address.port), PROBE_S).close()
    except ConnectionRefusedError:
        return f"nothing listens there: {ask}"
    except TimeoutError:
        return f"nothing answers there; the host is down, or a firewall drops packets: {ask}, and that firewalls let it through"
    except OSError as error:
        name = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            return f"there is no route ({name}): see that the address is right and that both hosts are on the network"
        return f"{name}: {ask}"
    return f"it accepts connections, and closes them at once: {ask}, and not another program"

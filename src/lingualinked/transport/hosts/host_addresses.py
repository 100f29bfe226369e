"""Addresses of hosts in numbers: looked up by name, of this host, and of this host as another one reaches it.

Knows the operating system's resolver, interfaces and routes; no ports and no keys.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator


def look_up(host: str) -> str:
    """Return the numeric address of a host; raise OSError, or UnicodeError for a name that can't be one."""
    *_, found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    # With the interface, if it is a link-local address.
    return socket.getnameinfo(found, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def local_host_towards(host: str, port: int) -> str:
    """Return the address of this host from which a numeric one is reached; raise OSError if no route leads there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing: it asks the kernel for the route
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def own_addresses(*families: int) -> Iterator[str]:
    """Return this host's addresses on all interfaces, of these families, or of IPv4 and IPv6."""
    import psutil  # only here: the command line imports this module for other commands, too

    for addresses in psutil.net_if_addrs().values():
        yield from (
            each.address for each in addresses if each.family in (families or (socket.AF_INET, socket.AF_INET6))
        )

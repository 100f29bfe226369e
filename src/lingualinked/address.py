"""Addresses of other machines, as people write them: ``tcp://HOST:PORT``, and what a device advertises.

Knows their form; resolves no name and opens no socket.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re

from lingualinked.errors import ArgumentError

_AFTER_HOST = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<ports>.*))?", re.DOTALL)
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """A TCP port of a host; equal addresses are written alike (host names in lower case, IP addresses in short)."""

    host: str  # a name, or an IP address without brackets
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every address of a host: one to listen at, not one to connect to."""
        return self.host in ("*", "0.0.0.0", "::")  # noqa: S104 - compared, not bound

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of the same machine can connect to it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclasses.dataclass(frozen=True, slots=True)
class Advertised:
    """Where others reach what listens on a host that they know by another address, or behind a port map."""

    host: str
    ports: range | None = None  # in the order of the ports that it listens at; None: the same ones


def parse_address(text: object, field: str, *, wildcard: bool = False) -> Address:
    """Parse ``tcp://HOST:PORT``: a name, an IPv4 address, an IPv6 address in brackets.

    With ``wildcard``, where to listen: also ``*``, and port 0 for any free one.
    """
    remedy = "write tcp://HOST:PORT, such as tcp://10.0.0.5:5600, tcp://nas.lan:5600 or tcp://[fe80::1%eth0]:5600"
    match = _AFTER_HOST.fullmatch(text.removeprefix("tcp://")) if isinstance(text, str) else None
    if not isinstance(text, str) or not text.startswith("tcp://") or match is None or not match["ports"]:
        raise ArgumentError(f"{field}={text!r} is not the address of a daemon: {remedy}")
    host = "*" if match["host"] == "*" else _parse_host(match["host"])
    ports = range(1) if wildcard and match["ports"] == "0" else _parse_ports(match["ports"])
    if host is None or ports is None or len(ports) != 1:
        wrong = f"{match['host']!r} is not a host" if host is None else f"{match['ports']!r} is not a port (1 to 65535)"
        raise ArgumentError(f"{field}={text!r} is not the address of a daemon: {wrong}; {remedy}")
    address = Address(host, ports[0])
    if address.is_wildcard and not wildcard:
        raise ArgumentError(
            f"{field}={text!r} is where a daemon listens, not where others reach it: write the host's own name or address"
        )
    return address


def parse_advertised(text: object, field: str) -> Advertised:
    """Parse ``HOST``, ``HOST:PORT`` or ``HOST:FIRST-LAST``."""
    match = _AFTER_HOST.fullmatch(text) if isinstance(text, str) else None
    host = None if match is None else _parse_host(match["host"])
    ports = None if match is None or match["ports"] is None else _parse_ports(match["ports"])
    if match is None or host is None or (ports is None and match["ports"] is not None):
        raise ArgumentError(
            f"{field}={text!r} is not a host that others can reach: write HOST, HOST:PORT or HOST:FIRST-LAST, such as "
            "203.0.113.7:5601-5699, with an IPv6 address in brackets"
        )
    advertised = Advertised(host, ports)
    if Address(host, 1).is_wildcard:
        raise ArgumentError(
            f"{field}={text!r} is not an address that others can reach: write the host's own name or address"
        )
    return advertised


def parse_ports(text: str, field: str) -> tuple[int, int]:
    """Parse ``PORT`` or ``FIRST-LAST``; return the first and the last one."""
    ports = _parse_ports(text)
    if ports is None:
        raise ArgumentError(f"{field}={text!r} is not a range of ports: write PORT or FIRST-LAST, such as 5601-5699")
    return ports[0], ports[-1]


def _parse_host(text: str) -> str | None:
    """Return a host in its one way of writing; ``None``: it is not valid."""
    try:
        if text.startswith("["):
            return str(ipaddress.IPv6Address(text[1:-1]))
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        labels = text.lower().removesuffix(".").split(".")
    # An address with a number too few or too many would be looked up as a name.
    is_name = not labels[-1].isdigit() and all(_LABEL.fullmatch(label) for label in labels)
    return ".".join(labels) if is_name and len(text) <= 253 else None


def _parse_ports(text: str) -> range | None:
    match = _PORTS.fullmatch(text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    return range(first, last + 1) if 1 <= first <= last <= 65535 else None

"""By which address each party of a cluster reaches each other one, as the caller tells them.

Knows addresses, hosts and who is on which; opens no socket and resolves no name.
"""

from __future__ import annotations

import dataclasses

from lingualinked.address import Address, Advertised, parse_address
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteHost:
    """The host of a device that has an address."""

    host_id: str  # equal for processes that can share memory
    host: str  # numeric, where others reach the device's worker
    local_host: str  # numeric, of this host, as the device reaches it


class Reach:
    """Who reaches whom by what.

    Parties of this host reach each other by unix sockets, and all others by TCP. A party of this host listens at each of
    the host's addresses that lead to a device. Of what a worker elsewhere says of itself only the port counts: nobody is
    told to connect to a host that it names.
    """

    def __init__(self, host_id: str, advertise: Advertised | None = None) -> None:
        self._host_id = host_id
        self._advertise = advertise  # with a numeric host
        self._remote: dict[str, RemoteHost] = {}
        self._addresses: dict[str, str] = {}  # as parties say them
        self._endpoints: dict[tuple[str, str], str] = {}  # by party of this host, and the address of the host
        self._relays: dict[tuple[str, str], str] = {}  # addresses, by who connects and to whom

    def add_remote(self, name: str, host: RemoteHost) -> None:
        """Record where a device is, before its worker has said hello."""
        self._remote[name] = host

    def add_party(self, name: str, address: str) -> None:
        """Record what a worker, or the caller, says of its address; raise ArgumentError if a remote one is not valid."""
        if name in self._remote:
            parse_address(address, "address of a worker", wildcard=True)
        self._addresses[name] = address

    def add_endpoint(self, name: str, local_host: str, address: str) -> None:
        """Record that a party of this host listens for devices that reach the host at this address of it."""
        self._endpoints[name, local_host] = address

    def add_relay(self, source: str, target: str, address: str) -> None:
        """Record that one party reaches another one at the address of a relay."""
        self._relays[source, target] = address

    def forget(self, name: str) -> None:
        """Forget a device and its worker."""
        self._remote.pop(name, None)
        self._addresses.pop(name, None)
        self._endpoints = {key: address for key, address in self._endpoints.items() if key[0] != name}
        self._relays = {key: address for key, address in self._relays.items() if name not in key}

    def shares_host(self, one: str, other: str) -> bool:
        """Whether two parties can share memory."""
        return self._id_of(one) == self._id_of(other)

    def uses_network(self, one: str, other: str) -> bool:
        """Whether two parties reach each other by TCP."""
        return one in self._remote or other in self._remote

    def missing_endpoint(self, one: str, other: str) -> tuple[str, TcpEndpoint] | None:
        """Return which of two parties has to listen at one more endpoint, so that the other one reaches it, and at which."""
        for of, seen_from in ((one, other), (other, one)):
            remote = self._remote.get(seen_from)
            if of not in self._remote and remote is not None and (of, remote.local_host) not in self._endpoints:
                return of, self._endpoint(remote.local_host)
        return None

    def address(self, of: str, seen_from: str) -> str:
        """Return the address by which a party reaches another one, which has said what it knows."""
        if (seen_from, of) in self._relays:
            return self._relays[seen_from, of]
        remote = self._remote.get(of)
        if remote is not None:
            return str(Address(remote.host, parse_address(self._addresses[of], "address", wildcard=True).port))
        if seen_from in self._remote:
            return self._endpoints[of, self._remote[seen_from].local_host]
        return self._addresses[of]

    def _endpoint(self, local_host: str) -> TcpEndpoint:
        if self._advertise is None:
            return TcpEndpoint(host=local_host)
        ports = self._advertise.ports
        return TcpEndpoint(
            host=local_host,
            ports=None if ports is None else (ports[0], ports[-1]),
            advertise=f"[{self._advertise.host}]" if ":" in self._advertise.host else self._advertise.host,
        )

    def _id_of(self, name: str) -> str:
        remote = self._remote.get(name)
        return self._host_id if remote is None else remote.host_id

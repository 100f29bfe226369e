"""Who reaches whom by which address: two local workers, two remote ones, of which one is on this host."""

from __future__ import annotations

import pytest

from lingualinked.address import parse_advertised
from lingualinked.cluster.messaging.reach import Reach, RemoteHost
from lingualinked.errors import ArgumentError
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint

IPC = {"caller": "ipc:///run/0", "here": "ipc:///run/1", "near": "ipc:///run/2"}


def made(advertise: str | None = None) -> Reach:
    reach = Reach("me", None if advertise is None else parse_advertised(advertise, "advertise"))
    for name, address in IPC.items():
        reach.add_party(name, address)
    reach.add_remote("nas", RemoteHost("other", "10.0.0.5", "10.0.0.1"))
    reach.add_remote("loop", RemoteHost("me", "::1", "::1"))
    reach.add_party("nas", "tcp://0.0.0.0:5601")
    reach.add_party("loop", "tcp://evil.example:5602")
    return reach


def test_parties_of_this_host_use_unix_sockets() -> None:
    reach = made()
    assert reach.address("here", "near") == IPC["here"]
    assert reach.address("caller", "here") == IPC["caller"]
    assert not reach.uses_network("here", "caller")
    assert reach.missing_endpoint("here", "caller") is None


def test_of_what_a_remote_worker_says_only_the_port_counts() -> None:
    reach = made()
    assert {reach.address("nas", name) for name in ("caller", "here", "loop")} == {"tcp://10.0.0.5:5601"}
    assert reach.address("loop", "nas") == "tcp://[::1]:5602"
    with pytest.raises(ArgumentError):
        reach.add_party("nas", "ipc:///run/docker.sock")


def test_a_party_of_this_host_listens_at_each_address_that_leads_to_a_device() -> None:
    reach = made()
    for one, other in (("here", "nas"), ("nas", "here")):
        assert reach.missing_endpoint(one, other) == ("here", TcpEndpoint(host="10.0.0.1"))
    reach.add_endpoint("here", "10.0.0.1", "tcp://10.0.0.1:700")
    assert reach.missing_endpoint("here", "nas") is None
    assert reach.missing_endpoint("here", "loop") == ("here", TcpEndpoint(host="::1"))
    assert reach.address("here", "nas") == "tcp://10.0.0.1:700"
    assert reach.missing_endpoint("nas", "loop") is None
    assert reach.uses_network("nas", "loop")


@pytest.mark.parametrize(
    ("advertise", "ports", "host"),
    [("laptop.lan", None, "laptop.lan"), ("[::2]:70-79", (70, 79), "[::2]"), ("10.9.9.9:70", (70, 70), "10.9.9.9")],
)
def test_what_the_caller_advertises_is_where_it_listens(
    advertise: str, ports: tuple[int, int] | None, host: str
) -> None:
    endpoint = TcpEndpoint(host="10.0.0.1", ports=ports, advertise=host)
    assert made(advertise).missing_endpoint("caller", "nas") == ("caller", endpoint)


def test_memory_is_shared_within_a_host() -> None:
    reach = made()
    assert reach.shares_host("here", "caller")
    assert reach.shares_host("loop", "caller")
    assert not reach.shares_host("nas", "caller")
    assert not reach.shares_host("nas", "loop")


def test_who_is_forgotten_may_come_again_elsewhere() -> None:
    reach = made()
    reach.add_endpoint("here", "10.0.0.1", "tcp://10.0.0.1:700")
    reach.forget("nas")
    reach.forget("here")
    reach.add_party("nas", "ipc:///run/3")
    assert reach.address("nas", "caller") == "ipc:///run/3"
    reach.add_remote("nas", RemoteHost("other", "10.0.0.5", "10.0.0.1"))
    reach.add_party("here", IPC["here"])
    assert reach.missing_endpoint("here", "nas") is not None

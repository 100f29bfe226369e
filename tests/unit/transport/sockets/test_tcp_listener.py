from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

import pytest

from lingualinked.errors import ArgumentError, ResourceError
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint, TcpListener


@contextlib.contextmanager
def listening(**endpoint: object) -> Iterator[TcpListener]:
    listener = TcpListener(TcpEndpoint(**endpoint))  # type: ignore[arg-type]
    try:
        yield listener
    finally:
        listener.close()


def free_ports(number: int) -> tuple[int, int]:
    """Return the first and the last one of some ports in a row that nothing listens at."""
    for first in range(20_000, 30_000, number):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + number):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first, first + number - 1
    raise AssertionError("no free ports")


def test_it_listens_at_any_free_port() -> None:
    with listening() as one, listening() as other:
        assert one.port != other.port
        assert one.address == f"tcp://127.0.0.1:{one.port}"


def test_it_takes_the_first_free_port_of_a_range() -> None:
    first, last = ports = free_ports(2)
    with listening(ports=ports) as one, listening(ports=ports) as other:
        assert (one.port, other.port) == ports
        with pytest.raises(ResourceError, match=rf"can't listen at 127\.0\.0\.1, ports {first}-{last}: in use already"):
            TcpListener(TcpEndpoint(ports=ports))


def test_a_port_that_is_taken_is_named() -> None:
    with listening() as one, pytest.raises(ResourceError, match=f"port {one.port}: in use already; name other ports"):
        TcpListener(TcpEndpoint(ports=(one.port, one.port)))


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(
        ArgumentError, match=r"can't listen at tcp://192\.0\.2\.1:0 .*name an IP address of this machine"
    ):
        TcpListener(TcpEndpoint(host="192.0.2.1"))


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_it_listens_over_ipv6(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listening(host=host) as listener:
        assert listener.address == f"tcp://[{host}]:{listener.port}"
        socket.create_connection(("::1", listener.port), timeout=30).close()
        if host == "::":
            socket.create_connection(("127.0.0.1", listener.port), timeout=30).close()


def test_what_is_advertised_is_the_address() -> None:
    first, last = ports = free_ports(2)
    with (
        listening(ports=ports, advertise="nas.lan:7000-7001") as one,
        listening(ports=ports, advertise="[::1]") as other,
    ):
        assert (one.address, one.port) == ("tcp://nas.lan:7000", first)
        assert (other.address, other.port) == (f"tcp://[::1]:{last}", last)


@pytest.mark.parametrize(
    ("ports", "advertise", "at"),
    [(None, "nas.lan:7000", "any free port"), ((7000, 7002), "nas.lan:7000-7001", "ports 7000-7002")],
)
def test_as_many_ports_are_advertised_as_there_are(ports: tuple[int, int] | None, advertise: str, at: str) -> None:
    with pytest.raises(
        ArgumentError,
        match=re.escape(f"advertise={advertise!r} must have as many ports as there are to listen at, which are {at}"),
    ):
        TcpListener(TcpEndpoint(ports=ports, advertise=advertise))

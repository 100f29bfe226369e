from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from lingualinked.address import Address
from lingualinked.transport.hosts.relay import MOST_CONNECTIONS, Relay
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint

WAIT_S = 30.0


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)
        yield server


@pytest.fixture
def relay(target: socket.socket) -> Iterator[Relay]:
    with contextlib.closing(Relay(TcpEndpoint(), Address("127.0.0.1", target.getsockname()[1]))) as relay:
        yield relay


def dial(relay: Relay) -> socket.socket:
    host, port = relay.address.removeprefix("tcp://").split(":")
    client = socket.create_connection((host, int(port)), timeout=WAIT_S)
    client.sendall(b"first")  # nothing is accepted before something is said
    return client


def test_bytes_arrive_both_ways_as_they_were_sent(relay: Relay, target: socket.socket) -> None:
    data = bytes(range(256)) * 20_000
    with dial(relay) as client, target.accept()[0] as server:
        server.settimeout(WAIT_S)
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        received = bytearray()
        while len(received) < 5 + len(data):
            received += server.recv(1 << 20)
        sender.join()
        assert received == b"first" + data
        server.sendall(b"back")
        assert client.recv(100) == b"back"


def test_the_end_of_one_side_is_the_end_of_the_other(relay: Relay, target: socket.socket) -> None:
    with dial(relay) as client:
        with target.accept()[0] as server:
            assert server.recv(5) == b"first"
        assert client.recv(100) == b""
    with dial(relay), target.accept()[0] as server:
        pass  # the other way round, and a second connection
    with dial(relay) as client, target.accept()[0] as server:
        client.close()
        server.settimeout(WAIT_S)
        assert server.recv(5, socket.MSG_WAITALL) == b"first"
        assert server.recv(5) == b""


def test_a_relay_has_few_connections_and_ends_all_when_it_is_closed(relay: Relay, target: socket.socket) -> None:
    with contextlib.ExitStack() as stack:
        clients, servers = [], []
        for _ in range(MOST_CONNECTIONS):
            clients.append(stack.enter_context(dial(relay)))
            servers.append(stack.enter_context(target.accept()[0]))
        with dial(relay) as one_too_many, contextlib.suppress(ConnectionResetError):
            assert one_too_many.recv(100) == b""
        relay.close()
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
        with pytest.raises(ConnectionRefusedError):
            dial(relay)


def test_a_target_that_is_not_there_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with (
        contextlib.closing(Relay(TcpEndpoint(), Address("127.0.0.1", port))) as relay,
        dial(relay) as client,
        contextlib.suppress(ConnectionResetError),
    ):
        assert client.recv(100) == b""

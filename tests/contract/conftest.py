"""Mailboxes that know each other, over each of the three transports; on that with unix sockets they share memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from contract.network import Network

IPC = pytest.param(
    "ipc", marks=pytest.mark.skipif(sys.platform != "linux", reason="names of sockets are too short elsewhere")
)


@pytest.fixture(autouse=True)
def all_tensors_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send tensors of any size through shared memory where there is some, except the first ones to a peer."""
    monkeypatch.setattr("lingualinked.transport.wire.codec.MIN_SHARED_BYTES", 1)


@pytest.fixture(params=["inprocess", IPC, "tcp"])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    made = Network(request.param)
    yield made
    made.close()


@pytest.fixture(params=[IPC, "tcp"])
def zmq_network(request: pytest.FixtureRequest) -> Iterator[Network]:
    made = Network(request.param)
    yield made
    made.close()

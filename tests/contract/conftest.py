"""Mailboxes that know each other, over each of the three transports."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from contract.network import Network

IPC = pytest.param(
    "ipc", marks=pytest.mark.skipif(sys.platform != "linux", reason="names of sockets are too short elsewhere")
)


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

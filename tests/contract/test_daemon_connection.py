"""A caller always hears what became of the worker that it asked a daemon for, also before it was granted."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import pytest

from lingualinked.address import Address
from lingualinked.cluster.remote.connection import Lease
from lingualinked.cluster.remote.remote_workers import RemoteWorkers
from lingualinked.device import Device
from lingualinked.errors import ClosedError, DaemonError
from lingualinked.protocol.daemon import Enter, FromDaemon, Refused, WorkerEnded, decode_to_daemon, encode
from lingualinked.transport.keys import generate_keypair
from lingualinked.worker.daemon.door import Door

Leases = concurrent.futures.Future[list[Lease]]


DAEMON_KEYS = generate_keypair()


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door(Address("127.0.0.1", 0), DAEMON_KEYS, "nas")
    yield door
    door.close()


@pytest.fixture
def workers(door: Door) -> Iterator[RemoteWorkers]:
    keys = generate_keypair()
    door.admit([keys.public])
    workers = RemoteWorkers((), keys)
    yield workers
    workers.stop()


@pytest.fixture
def leases(door: Door, workers: RemoteWorkers) -> Iterator[Leases]:
    """A worker that was asked for, of a daemon that has heard of it and not answered."""
    device = Device(name="a", address=str(door.address), server_key=DAEMON_KEYS.public)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        yield threads.submit(workers.lease, [device])


def receive(door: Door) -> bytes:
    """Wait for a caller that enters, and return its connection."""
    while True:
        door.wait(10, [])
        for received in door.receive():
            assert isinstance(decode_to_daemon(received.payload), Enter)
            return received.routing_id


@pytest.mark.parametrize("answer", [WorkerEnded(name="a", how="it was revoked"), Refused(reason="it was revoked")])
def test_a_worker_that_ends_before_it_is_granted(door: Door, leases: Leases, answer: FromDaemon) -> None:
    assert door.send(receive(door), encode(answer))
    with pytest.raises(DaemonError, match=r"'a'.*revoked"):
        leases.result(30)


def test_a_cluster_that_is_closed_before_it_is_granted(door: Door, workers: RemoteWorkers, leases: Leases) -> None:
    receive(door)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        stopped = threads.submit(workers.stop)
        door.wait(0.1, [])  # for it to leave
        door.close()
        with pytest.raises((ClosedError, DaemonError)):
            leases.result(30)
        stopped.result(30)

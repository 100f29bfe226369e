"""A caller always hears what became of the worker that it asked a daemon for, whenever the daemon says it."""

from __future__ import annotations

import concurrent.futures
import queue
from collections.abc import Iterator

import pytest

from lingualinked.address import Address
from lingualinked.cluster.remote.connection import Lease
from lingualinked.cluster.remote.remote_workers import RemoteWorkers
from lingualinked.device import Device
from lingualinked.errors import ArgumentError, ClosedError, DaemonError
from lingualinked.protocol.daemon import (
    Enter,
    Entered,
    FromDaemon,
    HostFacts,
    Leave,
    Left,
    OpenRelay,
    Refused,
    RelayOpened,
    ToDaemon,
    WorkerEnded,
    WorkerKeyMade,
    WorkerLeased,
    decode_to_daemon,
    encode,
)
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.versions import installed_versions
from lingualinked.worker.daemon.door import Door, Received

Leases = concurrent.futures.Future[list[Lease]]


DAEMON_KEYS = generate_keypair()
FACTS = HostFacts(
    name="nas",
    versions=installed_versions(),
    system="",
    processor="",
    num_cores=1,
    threads=1,
    accelerator="cpu",
    memory_bytes=1,
    available_bytes=1,
    leasable_bytes=None,
    free_disk_bytes=1,
    host_id="",
    allows_relays=True,
    advertise=None,
)
GRANTED = (Entered(facts=FACTS), WorkerLeased(name="a", memory_bytes=None, threads=1, accelerator="cpu"))
KEY = WorkerKeyMade(name="a", public_key="its key")
ENDED = WorkerEnded(name="a", how="it was killed")


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


def take(door: Door, kind: type[ToDaemon]) -> Received:
    """Wait for a message of that kind, past others."""
    while True:  # bounded by the time limit
        door.wait(10, [])
        for received in door.receive():
            if isinstance(decode_to_daemon(received.payload), kind):
                return received


def receive(door: Door) -> bytes:
    """Wait for a caller that enters, and return its connection."""
    return take(door, Enter).routing_id


def say(door: Door, caller: bytes, *messages: FromDaemon) -> None:
    for message in messages:
        assert door.send(caller, encode(message))


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


class Told:
    """What is reported of workers: one thing after the other."""

    def __init__(self) -> None:
        self.reports: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def key(self, name: str, public_key: str) -> None:
        self.reports.put((name, public_key))

    def end(self, name: str, how: str) -> None:
        self.reports.put((name, how))

    def next(self) -> tuple[str, str]:
        return self.reports.get(timeout=30)


def hear_all(door: Door, workers: RemoteWorkers, caller: bytes) -> None:
    """Return once the caller has handled all that was said: messages come in order."""
    opened = workers.open_relay("a", Address("127.0.0.1", 1))
    asked = decode_to_daemon(take(door, OpenRelay).payload)
    assert isinstance(asked, OpenRelay)
    say(door, caller, RelayOpened(number=asked.number, port=7, reason=""))
    assert opened.result(30) == 7


def test_what_is_said_of_a_worker_before_it_is_expected_is_kept(
    door: Door, workers: RemoteWorkers, leases: Leases
) -> None:
    told = Told()
    workers.start((), told.key, told.end)  # a cluster that has none there so far
    caller = receive(door)
    say(door, caller, *GRANTED, KEY)
    leases.result(30)
    hear_all(door, workers, caller)
    say(door, caller, ENDED)
    assert told.reports.empty()
    workers.add("a")
    assert [told.next(), told.next()] == [("a", "its key"), ("a", "it was killed")]


def test_a_worker_that_is_not_let_in_is_reported_as_ended(door: Door, workers: RemoteWorkers, leases: Leases) -> None:
    told = Told()

    def refuse(name: str, public_key: str) -> None:
        raise ArgumentError("that is no key")

    caller = receive(door)
    say(door, caller, *GRANTED, KEY)
    leases.result(30)
    workers.start(["a"], refuse, told.end)
    assert told.next() == ("a", "it was not let in (that is no key)")
    take(door, Leave)  # its worker is of no use
    say(door, caller, Left())

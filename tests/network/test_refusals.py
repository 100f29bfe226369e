"""What can't work is refused within seconds, by an error that names the host, the cause and the remedy; nothing is left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from network.conftest import make_network
from network.hosts import Host, Network
from network.lab import SLACK, log
from network.machines import PORT, Caller, CallerError, Daemon, own_key
from waiting import wait_until

pytestmark = pytest.mark.slow

WITHIN_S = 5.0
"""Until an error says what is wrong."""

SLACK_OF_IMPORTS = 8
"""Bounds count so many times where both sides first import the model's code, seconds of computing."""

OTHER_KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"  # of RFC 26's example: nobody's here


class Place:
    """A caller, a daemon that lets it in, and addresses where nothing is."""

    def __init__(self, network: Network, checkpoint: Path) -> None:
        self.network = network
        self.checkpoint = checkpoint
        self.laptop, self.host, self.other = (network.add(name) for name in ("laptop", "attic-nas", "cellar-pi"))
        self.daemon = Daemon(self.host, clients=[own_key(self.laptop)])
        self.caller = Caller(self.laptop)
        own_key(self.laptop, "unknown")  # which no daemon has heard of
        self.daemon.wait()

    @contextlib.contextmanager
    def daemon_at(self, host: Host, *options: str | Path) -> Iterator[Daemon]:
        """Run a daemon on another host."""
        daemon = Daemon(host, *options, clients=[own_key(self.laptop)])
        with daemon.program:
            daemon.wait()
            yield daemon


@pytest.fixture(scope="module")
def place(nothing_outlives_the_session: None, checkpoint: Path) -> Iterator[Place]:
    with make_network() as network:
        yield Place(network, checkpoint)


@dataclass(frozen=True)
class Refusal:
    """What a caller does, and what the error that it gets must say."""

    devices: str  # with {daemon.…} and {place.…}
    says: tuple[str, ...]  # regular expressions: the host, the cause, the remedy
    kind: str = "DaemonError"
    before: str = "pass"  # code that runs first


def device(place: Place, **fields: object) -> str:
    return place.daemon.device(**fields)


REFUSALS: dict[str, Refusal] = {
    "a wrong server key": Refusal(
        "ll.Device(name='attic-nas', address={daemon.address!r}, server_key={other_key!r})",
        ("attic-nas", "{daemon.host.address}", "does not hold the key SHA256:", "server_key="),
    ),
    "a key that is not authorised": Refusal(
        "ll.Device(name='attic-nas', address={daemon.address!r}, server_key={daemon.public_key!r}, key='unknown')",
        ("attic-nas", "{daemon.host.address}", "does not let in our key 'unknown'", "lingualinked keys authorize"),
    ),
    "a key that does not exist": Refusal(
        "ll.Device(name='attic-nas', address={daemon.address!r}, server_key={daemon.public_key!r}, key='none')",
        ("'none'", "lingualinked keys new none"),
        kind="ArgumentError",
    ),
    "a daemon whose key is not known": Refusal(
        "ll.Device(name='attic-nas', address={daemon.address!r})",
        ("attic-nas", "{daemon.host.address}", "is not known", "lingualinked keys trust"),
        kind="ArgumentError",
    ),
    "another version": Refusal(
        "{device}",
        (
            "attic-nas",
            "{daemon.host.address}",
            "it has lingualinked .*, and this process has 99.9",
            "install the same version",
        ),
        before=(
            "import importlib.metadata, unittest.mock\n"
            "version = importlib.metadata.version\n"
            "patch = unittest.mock.patch('importlib.metadata.version', lambda name: '99.9' if name == 'lingualinked' else version(name))\n"
            "patch.start()\n"
        ),
    ),
    "a host that is not there": Refusal(
        "ll.Device(name='attic-nas', address='tcp://10.0.0.200:5600', server_key={daemon.public_key!r})",
        ("attic-nas", "10.0.0.200:5600", "nothing answers", "lingualinked worker.*firewall"),
    ),
    "a port where nothing listens": Refusal(
        "ll.Device(name='attic-nas', address='tcp://{daemon.host.address}:5999', server_key={daemon.public_key!r})",
        ("attic-nas", "{daemon.host.address}:5999", "nothing listens", "lingualinked worker"),
    ),
    "a name that no server knows": Refusal(
        "ll.Device(name='attic-nas', address='tcp://attic-nas.invalid:5600', server_key={daemon.public_key!r})",
        ("attic-nas", "attic-nas.invalid", "can't be resolved", "write its IP address"),
    ),
    "two devices of one address": Refusal(
        "{device}, ll.Device(name='second', address={daemon.address!r}, server_key={daemon.public_key!r})",
        ("attic-nas", "second", "one address, {daemon.address}", "leave one of them out"),
        kind="ArgumentError",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_cluster_that_cannot_start_says_why(place: Place, what: str) -> None:
    refusal = REFUSALS[what]
    known = {"daemon": place.daemon, "device": place.daemon.device(), "other_key": OTHER_KEY}
    code = f"ll.Cluster([{refusal.devices.format(**known)}]).wait()"
    try:
        place.caller.run(refusal.before)
        with pytest.raises(CallerError) as raised:
            place.caller.run(code, timeout_s=60)
    finally:
        place.caller.run("if 'patch' in globals(): patch.stop(); del patch")
    check(raised.value, refusal.kind, [each.format(**known) for each in refusal.says])
    wait_until(lambda: not place.daemon.worker_pids)
    # The next cluster starts as if nothing had been.
    place.caller.run(f"with ll.Cluster([{place.daemon.device()}]) as cluster: cluster.wait()")
    wait_until(lambda: not place.daemon.worker_pids)


def check(error: CallerError, kind: str, says: list[str], slack: int = SLACK) -> None:
    log.info(f"{error.kind} after {error.seconds:.2f} s: {error.message}")
    assert error.kind == kind, error
    for each in says:
        assert re.search(each, error.message), f"{each!r} is not said: {error.message}"
    assert error.seconds < WITHIN_S * slack
    assert "Traceback" not in error.message


def test_a_host_that_drops_everything_is_named(place: Place) -> None:
    place.host.cut()
    try:
        with pytest.raises(CallerError) as raised:
            place.caller.run(f"ll.Cluster([{place.daemon.device()}]).wait()", timeout_s=60)
    finally:
        place.host.mend()
    check(raised.value, "DaemonError", ["attic-nas", place.host.address, "nothing answers", "firewall"])


def test_a_port_that_is_taken_is_named(place: Place) -> None:
    with place.host.start(*Daemon.command(place.host)) as second:
        assert second.process.wait(WITHIN_S * SLACK) != 0
        said = second.errors()
    log.info(said)
    for each in (str(PORT), "in use already", "name other ports"):
        assert re.search(each, said), said
    assert "Traceback" not in said
    assert place.daemon.program.process.poll() is None
    assert place.caller.run(f"with ll.Cluster([{place.daemon.device()}]) as cluster: cluster.wait(); result = True")


def test_a_daemon_on_a_network_address_needs_authorised_clients(place: Place) -> None:
    with place.other.start(*Daemon.command(place.other)) as daemon:
        assert daemon.process.wait(WITHIN_S * SLACK) != 0
        said = daemon.errors()
    log.info(said)
    for each in ("authori[sz]ed", "lingualinked keys authorize"):
        assert re.search(each, said), said
    assert "Traceback" not in said
    assert not place.other.pids()


def test_unknown_fields_of_a_cluster_file_are_named(place: Place) -> None:
    path = place.laptop.home / "cluster.toml"
    path.write_text('[[devices]]\nname = "attic-nas"\naddress = "tcp://10.0.0.5:5600"\nport = 5600\n')
    with pytest.raises(CallerError) as raised:
        place.caller.run("ll.Cluster('cluster.toml')")
    check(raised.value, "ArgumentError", ["cluster.toml", "'port'", "address"])


LOAD = """
plan = ll.Plan.from_spans([(cluster.devices[0].name, 0, 8)])
with ll.ShardedModel.from_pretrained(path, cluster=cluster, plan=plan, progress=False):
    result = "loaded"
"""


@contextlib.contextmanager
def open_on(place: Place, host: Host, *options: str | Path) -> Iterator[None]:
    """Open a cluster of one more host in the caller, as ``cluster``; nothing is left of it there."""
    with place.daemon_at(host, *options) as daemon:
        place.caller.run(f"cluster = ll.Cluster([{daemon.device()}]); cluster.wait()")
        yield
        place.caller.run("cluster.close()")
        wait_until(lambda: not daemon.worker_pids)


def test_a_full_disk_and_a_checkpoint_that_differs_are_named(place: Place) -> None:
    host = place.network.add("shed-pc")
    models = host.home / "models"
    shutil.copytree(place.checkpoint, models / place.checkpoint.name)
    with (models / place.checkpoint.name / "model.safetensors").open("r+b") as file:
        file.seek(-(512 << 10), os.SEEK_END)  # within the head: its values are others
        changed = bytes(255 - each for each in file.read(256 << 10))
        file.seek(-(512 << 10), os.SEEK_END)
        file.write(changed)
    (host.home / ".cache").mkdir()
    host.hidden.append(place.checkpoint)
    host.small[host.home / ".cache"] = "1m"
    with open_on(place, host, "--models", models):
        with pytest.raises(CallerError) as raised:
            place.caller.run(LOAD, path=str(place.checkpoint))
        check(
            raised.value, "ResourceError", ["shed-pc", "the disk of .* is full", "free disk space, set XDG_CACHE_HOME"]
        )


@pytest.mark.lengthy
def test_a_copy_that_differs_is_named_where_every_byte_is_compared(place: Place) -> None:
    host = place.network.add("barn-pc")
    models = host.home / "models"
    shutil.copytree(place.checkpoint, models / place.checkpoint.name)
    with (models / place.checkpoint.name / "model.safetensors").open("r+b") as file:
        file.seek(-5000, os.SEEK_END)  # within a tensor, where a quick look does not go
        changed = bytes([255 - file.read(1)[0]])
        file.seek(-5000, os.SEEK_END)
        file.write(changed)
    host.hidden.append(place.checkpoint)
    with open_on(place, host, "--models", models, "--verify"):
        with pytest.raises(CallerError) as raised:
            place.caller.run(LOAD, path=str(place.checkpoint))
        check(raised.value, "CheckpointError", ["barn-pc", "differs", str(models)], SLACK_OF_IMPORTS)


def test_models_that_are_not_there_are_named(place: Place) -> None:
    own = place.daemon.host.home / "models"
    with place.host.start(*Daemon.command(place.host, "--models", own)) as daemon:
        assert daemon.process.wait(WITHIN_S * SLACK) != 0
        said = daemon.errors()
    log.info(said)
    for each in (str(own), "--models"):
        assert re.search(each, said), said
    assert "Traceback" not in said


@pytest.mark.lengthy
def test_models_that_lack_it_are_made_up_for(place: Place) -> None:
    host = place.network.add("loft-pc")
    (host.home / "models" / "another").mkdir(parents=True)
    host.hidden.append(place.checkpoint)
    with open_on(place, host, "--models", host.home / "models"):
        assert place.caller.run(LOAD, path=str(place.checkpoint)) == "loaded"

"""What a caller and a daemon say to each other survives the wire, one way each, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given, strategies as st

from lingualinked.errors import ProtocolError
from lingualinked.protocol import daemon
from lingualinked.protocol.boot import Boot, Emulation
from lingualinked.protocol.daemon import decode_from_daemon, decode_to_daemon, encode
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint
from lingualinked.versions import Versions, installed_versions

FACTS = daemon.HostFacts(
    name="nas",
    versions=Versions("1", "2", "3", "4"),
    system="Linux 6",
    processor="a processor",
    num_cores=4,
    threads=4,
    accelerator="cpu",
    memory_bytes=2**40,
    available_bytes=2**39,
    leasable_bytes=None,
    free_disk_bytes=2**41,
    host_id="0" * 32,
    allows_relays=False,
    advertise=None,
)
BOOT = Boot(
    name="a",
    socket_folder="",
    caller_address="tcp://10.0.0.1:1",
    caller_key="key",
    starter_pid=0,
    same_host=True,
    tcp=TcpEndpoint(),
    accelerator="cpu",
    threads=1,
    cpus=None,
    memory_bytes=2**63,
    max_frame_bytes=1,
    shared_memory=True,
    log_level=30,
    emulation=Emulation(slowdown=1.0, links=(), delayed_from=()),
)
TO_DAEMON = [
    daemon.Enter(versions=installed_versions()),
    daemon.StartWorker(name="a", class_names=("LlamaForCausalLM",), memory_bytes=2**40, threads=None),
    daemon.BootWorker(boot=BOOT),
    daemon.OpenRelay(number=3, host="::1", port=65535),
    daemon.Leave(),
]
FROM_DAEMON = [
    daemon.Entered(facts=FACTS),
    daemon.WorkerLeased(name="a", memory_bytes=None, threads=4, accelerator="cuda:0"),
    daemon.Refused(reason="no memory"),
    daemon.WorkerKeyMade(name="a", public_key="key"),
    daemon.WorkerEnded(name="a", how="exit status 1"),
    daemon.Beat(),
    daemon.RelayOpened(number=3, port=None, reason="no port is free"),
    daemon.Left(),
]


def test_messages_survive() -> None:
    assert [decode_to_daemon(encode(message)) for message in TO_DAEMON] == TO_DAEMON
    assert [decode_from_daemon(encode(message)) for message in FROM_DAEMON] == FROM_DAEMON
    assert {type(message) for message in TO_DAEMON} == set(get_args(daemon.ToDaemon))
    assert {type(message) for message in FROM_DAEMON} == set(get_args(daemon.FromDaemon))


def test_the_documentation_explains_every_message() -> None:
    page = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8").partition("## Daemons")[2]
    names = [type(message).__name__ for message in (*TO_DAEMON, *FROM_DAEMON)]
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.parametrize("message", FROM_DAEMON)
def test_a_daemon_hears_only_what_callers_say(message: daemon.FromDaemon) -> None:
    with pytest.raises(ProtocolError, match="not a message between a caller and a daemon"):
        decode_to_daemon(encode(message))


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_a_message(payload: bytes) -> None:
    for decode in (decode_to_daemon, decode_from_daemon):
        try:
            message = decode(payload)
        except ProtocolError:
            continue
        assert isinstance(message, msgspec.Struct)

"""What an authorised client of a daemon may do to it: nothing that ends it, or that other clients notice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

import lingualinked as ll
from daemons import DaemonProcess, Daemons, running_daemons
from lingualinked.protocol.daemon import (
    Beat,
    Enter,
    FromDaemon,
    OpenRelay,
    Refused,
    RelayOpened,
    StartWorker,
    ToDaemon,
    decode_from_daemon,
    encode,
)
from lingualinked.versions import Versions, installed_versions

pytestmark = pytest.mark.process

Connect = Callable[[], "Client"]


class Client:
    """A connection of an authorised client, which sends what it likes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], daemon: DaemonProcess, daemons: Daemons) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = self.socket.sndhwm = 0
        self.socket.heartbeat_ivl = 100
        self.socket.curve_serverkey = daemon.server_key.encode()
        self.socket.curve_publickey = daemons.keys.public.encode()
        self.socket.curve_secretkey = daemons.keys.secret.encode()
        self.socket.connect(daemon.address)

    def say(self, *messages: ToDaemon) -> FromDaemon:
        """Send messages, and return the first answer that is no beat."""
        for message in messages:
            self.socket.send(encode(message))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.socket.poll(1000) and not isinstance(answer := decode_from_daemon(self.socket.recv()), Beat):
                return answer
        raise TimeoutError(f"no answer to {messages}")


@pytest.fixture(scope="module")
def daemons(shared_fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with running_daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        yield daemons


@pytest.fixture(scope="module")
def daemon(daemons: Daemons) -> DaemonProcess:
    return daemons.start("--bind", "tcp://0.0.0.0:0", "--advertise", "127.0.0.1", "--relay")


@pytest.fixture
def connect(daemon: DaemonProcess, daemons: Daemons) -> Iterator[Connect]:
    with contextlib.ExitStack() as ends:
        context = ends.enter_context(zmq.Context())

        def make() -> Client:
            client = Client(context, daemon, daemons)
            ends.callback(client.socket.close)
            return client

        yield make
    daemon.wait_until_idle()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0"])
def test_a_relay_leads_to_other_hosts_alone(connect: Connect, host: str) -> None:
    client = connect()
    client.say(Enter(versions=installed_versions()))
    opened = client.say(OpenRelay(number=1, host=host, port=22))
    assert isinstance(opened, RelayOpened)
    assert opened.port is None


def test_texts_that_control_a_terminal_get_into_no_log(daemon: DaemonProcess, connect: Connect) -> None:
    own = installed_versions()
    assert isinstance(connect().say(Enter(versions=Versions("\x1b[2J\nforged", *own[1:]))), Refused)
    for name, class_names in (("\x1b[2J\nforged", ()), ("a" * 500_000, ()), ("a", ("LlamaForCausalLM",) * 10_000)):
        client = connect()
        client.say(Enter(versions=own))
        refused = client.say(StartWorker(name=name, class_names=class_names, memory_bytes=None, threads=None))
        assert isinstance(refused, Refused)
        assert "printable" in refused.reason
    assert "\x1b" not in daemon.log()
    assert "forged" not in daemon.log()


def test_a_flood_ends_the_connection_and_not_the_daemon(daemon: DaemonProcess, connect: Connect) -> None:
    # libzmq would abort if it had stopped reading the connection before it ended
    with ll.Cluster([daemon.device("honest")]) as cluster:
        cluster.wait()
        flooding = connect()
        flooding.say(Enter(versions=installed_versions()))
        for _ in range(20_000):
            flooding.socket.send(b"\xff")
        daemon.wait_for_log("sends too many messages")
        flooding.socket.close()
        time.sleep(0.6)  # until the next heartbeat
        assert daemon.process.poll() is None
        cluster.wait()  # raises if the worker has ended
    assert daemon.log().count("the payload is not a message") < 5_000

"""What holds only where there are sockets: encryption, authentication, and what is left in the system."""

from __future__ import annotations

import contextlib
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from contract.network import WAIT_S, Network
from contract.test_mailbox import VALID, take
from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.transport.keys.keys import KeyPair, generate_keypair
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox
from waiting import wait_until


class Interrupted:
    """A socket that is interrupted right after its first frame."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, *args: Any, **kwargs: Any) -> None:
        self._inner.send(*args, **kwargs)
        raise KeyboardInterrupt

    def recv(self, *args: Any, **kwargs: Any) -> None:
        frame = self._inner.recv(*args, **kwargs)
        if kwargs:  # reading a message, not what is left of one
            raise KeyboardInterrupt
        return frame


GARBAGE = b"GET / HTTP/1.1\r\n\r\n" * 10
GREETING = bytes([0xFF, *bytes(8), 0x7F, 3, 0]) + b"CURVE".ljust(20, b"\0") + bytes(32)
SPOKEN = {
    "no ZeroMQ": GARBAGE,
    "ZMTP 1": b"\x01\x00\x06\x00hello",
    "ZMTP 2": bytes([0xFF, *bytes(7), 1, 0x7F, 1, 8, 0, 0]),
    "no handshake": GREETING + GARBAGE,
    "silence": b"",
}


def dial(mailbox: Any) -> socket.socket:
    """Connect to a mailbox without libzmq."""
    kind, _, where = mailbox.address.partition("://")
    if kind == "tcp":
        host, port = where.split(":")
        raw = socket.create_connection((host, int(port)))
    else:
        raw = socket.socket(socket.AF_UNIX)
        try:
            raw.connect(where)
        except OSError:
            raw.close()
            raise
    raw.settimeout(WAIT_S)
    return raw


def speak(mailbox: Any, data: bytes) -> None:
    """Send bytes, and wait until libzmq hangs up."""
    with dial(mailbox) as raw, contextlib.suppress(ConnectionError):
        raw.sendall(data)
        while raw.recv(1024):
            pass


def await_count(mailbox: Any, num_refused: int) -> None:
    """Wait until exactly this number of refusals is counted."""
    while mailbox.num_refused < num_refused:  # bounded by the time limit
        assert mailbox.receive(0.005) is None
    assert mailbox.num_refused == num_refused


def curve(server: str, keys: KeyPair) -> dict[str, str]:
    return {"curve_serverkey": server, "curve_publickey": keys.public, "curve_secretkey": keys.secret}


@contextlib.contextmanager
def wrong_peer(mailbox: Any, options: dict[str, str], kind: int = zmq.PUSH) -> Iterator[None]:
    """Connect with libzmq, once."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        peer = context.socket(kind)
        peer.reconnect_ivl = -1
        for option, value in options.items():
            setattr(peer, option, value.encode())
        peer.connect(mailbox.address)
        yield
    finally:
        context.destroy(linger=0)


def test_each_connection_without_an_authorised_key_is_counted_once(zmq_network: Network) -> None:
    b = zmq_network.open("b", ["a"])
    friend, stranger, server = zmq_network.keys["a"], generate_keypair(), zmq_network.keys["b"].public
    num_refused = 0
    for wrong in (
        wrong_peer(b, curve(server, stranger)),
        wrong_peer(b, curve(stranger.public, friend)),
        wrong_peer(b, {}),
        wrong_peer(b, {"plain_username": "a", "plain_password": "b"}),
        wrong_peer(b, curve(server, friend), zmq.REQ),
    ):
        with wrong:
            num_refused += 1
            await_count(b, num_refused)
    dial(b).close()
    num_refused += 1
    await_count(b, num_refused)
    for data in SPOKEN.values():
        speak(b, data)
        num_refused += 1
        await_count(b, num_refused)


def test_a_key_can_not_hold_many_connections_nor_keep_another_out(zmq_network: Network) -> None:
    b = zmq_network.open("b", ["a", "c"])
    keys, server = zmq_network.keys["a"], zmq_network.keys["b"].public
    with contextlib.ExitStack() as peers:
        for _ in range(30):
            peers.enter_context(wrong_peer(b, curve(server, keys)))
        await_count(b, 22)
        c = zmq_network.open("c", ["b"])
        c.connect("b", b.address, server)
        c.send("b", b"in spite of them")
        assert take(b).payload == b"in spite of them"
    a, delivery = zmq_network.open("a", ["b"]), None
    while delivery is None:  # until it is noticed that they have ended; bounded by the time limit
        a.disconnect("b")
        a.connect("b", b.address, server)
        with contextlib.suppress(ProtocolError):  # refused once more
            a.send("b", b"now that they are gone")
        delivery = b.receive(0.2)


@pytest.mark.parametrize("zmq_network", ["tcp"], indirect=True)
def test_connections_are_counted_while_others_are_new_or_flood(zmq_network: Network) -> None:
    a, b = zmq_network.open_all("a", "b")
    a.send("b", b"before")
    assert take(b).payload == b"before"
    for number in range(3_000):
        dial(b).close()
        if number % 100 == 0:
            a.send("b", b"meanwhile")
            assert take(b).payload == b"meanwhile"
    await_count(b, 3_000)
    a.send("b", b"after")
    assert take(b).payload == b"after"
    a.close()  # what ends after its handshake is not counted
    speak(b, GARBAGE)
    await_count(b, 3_001)


def test_a_mailbox_closes_in_a_flood(zmq_network: Network) -> None:
    b = zmq_network.open("b", [])
    ended = threading.Event()

    def flood() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                dial(b).close()

    threads = [threading.Thread(target=flood) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        while b.num_refused < 500:  # bounded by the time limit
            assert b.receive(0.005) is None
        b.close()  # that no thread and no descriptor is left is what every test is checked for
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_a_peer_without_encryption_never_gets_in(zmq_network: Network) -> None:
    a, b = zmq_network.open_all("a", "b")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    plain, events = context.socket(zmq.PUSH), None
    try:
        events = plain.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        plain.connect(b.address)
        plain.send_multipart(VALID, zmq.DONTWAIT)
        assert events.poll(WAIT_S * 1000), "the handshake neither failed nor succeeded"
        a.send("b", b"goes on")
        assert take(b).payload == b"goes on"
        assert b.receive(0) is None
    finally:
        plain.disable_monitor()
        context.destroy(linger=0)


def test_a_peer_that_speaks_no_zeromq_does_no_harm(zmq_network: Network) -> None:
    a, b = zmq_network.open_all("a", "b")
    speak(b, GARBAGE)
    a.send("b", b"goes on")
    assert take(b).payload == b"goes on"


def test_a_frame_beyond_the_limit_costs_only_its_sender_the_connection(zmq_network: Network) -> None:
    a, b = zmq_network.open_all("a", "b", max_frame_bytes=1_000)
    zmq_network.send_raw("a", b, [bytes(1_001)])
    a.send("b", b"goes on")
    assert take(b).payload == b"goes on"
    delivery = None
    while delivery is None:  # libzmq connects again; what leaves before it knows is lost. Bounded by the time limit
        zmq_network.send_raw("a", b, VALID)
        delivery = b.receive(0.02)
    assert delivery.payload == b"valid"


@pytest.mark.parametrize("zmq_network", ["tcp"], indirect=True)
def test_the_wire_shows_no_plain_text(zmq_network: Network) -> None:
    a, b = zmq_network.open("a", ["b"]), zmq_network.open("b", ["a"])
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)

        def relay() -> None:
            host, port = b.address.removeprefix("tcp://").split(":")
            near, _ = server.accept()
            with near, socket.create_connection((host, int(port))) as far:
                backward = threading.Thread(target=pump, args=(far, near))
                backward.start()
                pump(near, far)
                backward.join(WAIT_S)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            try:
                while data := source.recv(65_536):
                    seen.extend(data)
                    sink.sendall(data)
            except OSError:
                pass
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=relay)
        thread.start()
        a.connect("b", f"tcp://127.0.0.1:{server.getsockname()[1]}", zmq_network.keys["b"].public)
        a.send("b", b"a very secret payload", [torch.full((100,), 0x5A, dtype=torch.uint8)])
        assert take(b).payload == b"a very secret payload"
        a.close()
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert b"CURVE" in seen
    assert b"secret" not in seen
    assert b"ZZZZZZZZ" not in seen


def test_an_interrupted_send_does_not_spoil_the_next_message(zmq_network: Network) -> None:
    a, b = zmq_network.open_all("a", "b")
    a.send("b", b"before")
    take(b)
    a._sockets.outboxes["b"] = Interrupted(a._sockets.outboxes["b"])
    with pytest.raises(KeyboardInterrupt):
        a.send("b", b"interrupted", [torch.ones(3)])
    a.send("b", b"after", [torch.zeros(3)])
    assert take(b).payload == b"after"
    assert b.num_refused == 0


def test_an_interrupted_receive_does_not_spoil_the_next_message(zmq_network: Network) -> None:
    a, b = zmq_network.open_all("a", "b")
    inbox = b._inbox
    b._inbox = Interrupted(inbox)
    a.send("b", b"interrupted", [torch.ones(3), torch.ones(3)])
    with pytest.raises(KeyboardInterrupt):
        b.receive(WAIT_S)
    b._inbox = inbox
    a.send("b", b"after", [torch.zeros(3)])
    assert take(b).payload == b"after"
    assert b.num_refused == 0


def test_the_handlers_own_thread_may_close(zmq_network: Network) -> None:
    """As when the garbage collector runs a finalizer in the middle of the call."""
    b = zmq_network.open("b", [])
    outsider = zmq_network.open("outsider", [])
    done = threading.Event()

    def close_in_there(*_: str) -> None:
        assert threading.current_thread().name == "lingualinked-zap"
        b.close()
        done.set()

    b._refusals.add = close_in_there
    outsider.connect("b", b.address, zmq_network.keys["b"].public)
    assert done.wait(WAIT_S)  # that the thread ends too is what every test is checked for


def test_ipc_addresses_are_in_a_private_folder_and_tcp_ones_local(zmq_network: Network) -> None:
    a = zmq_network.open("a", [])
    if zmq_network.kind == "tcp":
        assert a.address.startswith("tcp://127.0.0.1:")
        return
    path = Path(a.address.removeprefix("ipc://"))
    assert path.is_socket()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    a.close()
    assert not path.parent.exists()


def test_a_mailbox_has_one_inbox_for_all_its_addresses() -> None:
    mine, near, far = generate_keypair(), generate_keypair(), generate_keypair()
    with contextlib.ExitStack() as stack:
        box = stack.enter_context(ZmqMailbox("box", mine, tcp=TcpEndpoint(advertise="10.77.0.1")))
        kinds = [address.partition(":")[0] for address in box.addresses]
        assert kinds == (["ipc", "tcp"] if zmq.has("ipc") else ["tcp"])
        port = box.addresses[-1].removeprefix("tcp://10.77.0.1:")
        for name, keys, address in (("near", near, box.address), ("far", far, f"tcp://127.0.0.1:{port}")):
            box.authorise(name, keys.public)
            peer = stack.enter_context(ZmqMailbox(name, keys, ipc=False))
            peer.connect("box", address, mine.public)
            peer.send("box", b"", [torch.ones(2)])
        assert {take(box).sender, take(box).sender} == {"near", "far"}


@pytest.mark.parametrize("zmq_network", ["tcp"], indirect=True)
def test_a_connection_that_is_awaited_is_not_missed_by_who_asks_for_another(
    zmq_network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (zmq_network.open(name, "abc") for name in "abc")
    b.connect("a", a.address, zmq_network.keys["a"].public)
    b.send("a", b"")
    for peer in (b, c):
        a.connect(peer.name, peer.address, zmq_network.keys[peer.name].public)
    with monkeypatch.context() as patch:
        patch.setattr(a._sockets, "read_events", lambda: None)
        assert not a.is_connected("b")
    wait_until(lambda: a.is_connected("c") and not a._sockets.connecting)
    assert a.receive(WAIT_S) is None  # as after a wake, before the message
    assert a.is_connected("b")
    assert take(a).sender == "b"


@pytest.mark.parametrize("zmq_network", ["tcp"], indirect=True)
def test_a_connection_has_come_about_or_it_is_said_why_not(zmq_network: Network) -> None:
    b = zmq_network.open("b", ["a"])
    a = zmq_network.open("a", [])
    a.connect("b", b.address, zmq_network.keys["b"].public)
    while not a.is_connected("b"):  # bounded by the time limit
        assert a.receive(WAIT_S) is None  # as after a wake
    assert a.explain_unconnected("b") == ""
    stranger = zmq_network.open("stranger", [])
    with socket.create_server(("127.0.0.1", 0)) as server:
        nowhere = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    reasons = {}
    for name, address, key in (
        ("unwelcome", b.address, "b"),
        ("another key", b.address, "c"),
        ("nowhere", nowhere, "b"),
    ):
        stranger.connect(name, address, zmq_network.keys[key].public)
    await_count(b, 2)
    for name in ("unwelcome", "another key", "nowhere"):
        assert not stranger.is_connected(name)
        reasons[name] = stranger.explain_unconnected(name)
    assert reasons == {
        "unwelcome": "it refused the key",
        "another key": "what listens there has another key, or is something else",
        "nowhere": "connection refused: nothing listens there, or a firewall rejects it",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux filters what comes to a socket")
@pytest.mark.parametrize("zmq_network", ["tcp"], indirect=True)
@pytest.mark.parametrize("spoken", [b"", GREETING[:12], GREETING], ids=["silent", "begun", "greeted"])
def test_half_open_connections_leave_descriptors_and_sessions_alone(zmq_network: Network, spoken: bytes) -> None:
    a, b = zmq_network.open_all("a", "b")
    host, port = b.address.removeprefix("tcp://").split(":")
    handles, most = Path("/proc/self/fd"), 0
    before = sum(1 for _ in handles.iterdir())
    with contextlib.ExitStack() as stack:
        for number in range(600):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((host, int(port)))
            with contextlib.suppress(OSError):
                client.send(spoken)
            if number % 20 == 0:
                a.send("b", b"meanwhile")
                assert take(b).payload == b"meanwhile"
            most = max(most, sum(1 for _ in handles.iterdir()) - before - number)
    assert most < 550
    a.send("b", b"after")
    assert take(b).payload == b"after"


def test_a_socket_lies_in_the_folder_that_is_named(tmp_path: Path) -> None:
    with ZmqMailbox("a", generate_keypair(), socket_folder=str(tmp_path)) as a:
        assert [f"ipc://{path}" for path in tmp_path.iterdir()] == [a.address]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address",
    [
        "pgm://eth0;239.192.1.1:5555",
        "epgm://eth0;239.192.1.1:5555",
        "udp://127.0.0.1:5555",
        "vmci://*:5555",
        "ws://127.0.0.1:5555",
        "inproc://zeromq.zap.01",
        "tcp://localhost:5555",
        "tcp://example.org:5555",
        "tcp://eth0;127.0.0.1:5555",
        "tcp://127.0.0.1:*",
        "ipc://@lingualinked",
        "ipc:///run/docker.sock",
        "ipc:///tmp/01234567",
        "ipc://01234567",
        "",
        "tcp://127.0.0.1:5555\n",
    ],
)
def test_nothing_but_mailboxes_is_connected_to(tmp_path: Path, address: str) -> None:
    """Some transports of libzmq abort the process, names would be looked up, and other sockets are off limits."""
    keys = generate_keypair()
    with ZmqMailbox("me", keys, socket_folder=str(tmp_path)) as mailbox:
        with pytest.raises(ArgumentError, match="does not connect to 'other'"):
            mailbox.connect("other", address, keys.public)
        mailbox.connect("near", f"ipc://{tmp_path}/01234567", keys.public)
        mailbox.connect("far", "tcp://127.0.0.1:5555", keys.public)
        mailbox.connect("farther", "tcp://[fe80::1%lo]:5555", keys.public)


def test_what_fails_in_the_making_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"can't listen at tcp://192\.0\.2\.1:5601 \(Cannot assign"):
        ZmqMailbox("a", generate_keypair(), tcp=TcpEndpoint(host="192.0.2.1", ports=(5601, 5609)))
    monkeypatch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no more threads")))
    with pytest.raises(RuntimeError, match="no more threads"):
        ZmqMailbox("a", generate_keypair())


def test_a_process_ends_without_closing_and_a_forked_child_harms_nobody() -> None:
    script = """
        import os, threading
        from lingualinked.transport.keys.keys import generate_keypair
        from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox

        keys = generate_keypair()
        box = ZmqMailbox("a", keys)
        box.authorise("a", keys.public)
        box.connect("a", box.address, keys.public)
        child = os.fork()
        if child == 0:
            box.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        box.send("a", b"payload")
        assert box.receive(30).payload == b"payload"
        assert any(thread.name == "lingualinked-zap" for thread in threading.enumerate())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_ending_that_takes_too_long_is_logged(zmq_network: Network, caplog: pytest.LogCaptureFixture) -> None:
    a = zmq_network.open("a", [])
    handler = a._sockets._zap
    ends = handler.stop
    handler.stop = lambda timeout_s: ends(timeout_s) and False
    a.close()
    assert "did not end within" in caplog.text

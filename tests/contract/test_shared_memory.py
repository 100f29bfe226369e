"""Large tensors go through memory that two mailboxes share, and over the socket wherever that is not possible."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from contract.network import WAIT_S, Network
from contract.test_mailbox import VALID, take
from contract.test_zmq_mailbox import Interrupted
from lingualinked.transport.memory.shared_ring import RingWriter
from lingualinked.transport.wire.message_limits import RING_BYTES
from waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network("ipc")
    yield made
    made.close()


@pytest.fixture
def pair(network: Network) -> tuple[Any, Any]:
    """Two mailboxes, the first of which has found out that it shares memory with the second."""
    a, b = network.open_all("a", "b")
    exchange(a, b)
    assert (a.sent_shared_bytes, b.received_shared_bytes) == (0, 0)
    return a, b


def exchange(a: Any, b: Any, num_elements: int = 1_000) -> None:
    tensor = torch.randn(num_elements)
    a.send(b.name, b"", [tensor])
    assert torch.equal(take(b).tensors[0], tensor)


def test_tensors_go_through_shared_memory_once_the_receiver_has_opened_it(pair: tuple[Any, Any]) -> None:
    a, b = pair
    for number in range(1, 5):
        exchange(a, b)
        assert a.sent_shared_bytes == b.received_shared_bytes == number * 4_000
    exchange(b, a)  # each direction has memory of its own
    exchange(b, a)
    assert b.sent_shared_bytes == a.received_shared_bytes == 4_000


def test_small_tensors_go_over_the_socket(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    monkeypatch.setattr("lingualinked.transport.wire.codec.MIN_SHARED_BYTES", 4_000)
    exchange(a, b, 999)
    assert a.sent_shared_bytes == 0
    exchange(a, b, 1_000)
    assert a.sent_shared_bytes == 4_000


@pytest.mark.parametrize("without", ["a", "b"])
def test_either_side_can_do_without(network: Network, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    boxes = []
    for name in ("a", "b"):
        network.kind = "tcp" if name == without else "ipc"  # where the others of these tests share memory
        boxes.append(network.open(name, ["a", "b"]))
    a, b = boxes
    a.connect("b", b.address, network.keys["b"].public)
    for _ in range(3):
        exchange(a, b)
    assert (a.sent_shared_bytes, b.received_shared_bytes) == (0, 0)


def test_without_proc_everything_goes_over_the_socket(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from another machine, or another container."""

    def refuse(_: object, **_how: object) -> None:
        raise FileNotFoundError("/proc")

    monkeypatch.setattr("lingualinked.transport.memory.rings.RingReader", refuse)
    a, b = network.open_all("a", "b")
    for _ in range(3):
        exchange(a, b)
    assert (a.sent_shared_bytes, b.num_refused) == (0, 0)


def test_order_holds_when_the_ring_is_full(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 << 20
    monkeypatch.setattr(
        "lingualinked.transport.memory.rings.RingWriter", functools.partial(RingWriter, capacity=3 * size)
    )
    a, b = network.open_all("a", "b")
    exchange(a, b)
    for number in range(6):  # the first three are more than fits
        a.send("b", b"%d" % number, [torch.full((size,), number, dtype=torch.uint8), torch.tensor(number)])
    assert a.sent_shared_bytes == 2 * (size + 8)
    for number in range(6):
        delivery = take(b)
        assert delivery.payload == b"%d" % number
        assert bool((delivery.tensors[0] == number).all())
        assert delivery.tensors[1].item() == number
    exchange(a, b)
    assert a.sent_shared_bytes == b.received_shared_bytes == 2 * (size + 8) + 4_000


def test_what_waits_for_an_emulated_link_does_not_occupy_the_ring(pair: tuple[Any, Any]) -> None:
    a, b = pair
    b.expect_delays(["a"])
    a.shape_link("b", 5e4, 0.0)
    num_bytes = [a.send("b", b"", [torch.full((25_000,), number, dtype=torch.uint8)]) for number in range(2)]
    assert a.sent_shared_bytes == 50_000
    wait_until(lambda: b.receive(0.0) is None and b._delayed.num_bytes("a") == sum(num_bytes))
    a._rings.writers["b"]._read_receipt()
    assert len(a._rings.writers["b"]._unread) == 0
    first, second = take(b), take(b)
    assert [delivery.tensors[0][0].item() for delivery in (first, second)] == [0, 1]
    # Transmission takes as long as over a socket: 25 kB at 50 kB/s.
    assert second.due_s - first.due_s >= 25_000 / 5e4


def test_a_new_connection_has_a_ring_of_its_own(pair: tuple[Any, Any], network: Network) -> None:
    a, b = pair
    exchange(a, b)
    a.send("b", b"of the old one", [torch.ones(3)])
    delivery = take(b)
    a.disconnect("b")
    a.connect("b", b.address, network.keys["b"].public)
    for _ in range(2):
        exchange(a, b)
    assert a.sent_shared_bytes == b.received_shared_bytes == 2 * 4_000 + 12
    assert delivery.tensors[0].tolist() == [1, 1, 1]
    assert len(b._rings.readers[network.keys["a"].public]) == 2


def test_an_interrupted_send_leaves_no_gap(pair: tuple[Any, Any]) -> None:
    a, b = pair
    a._sockets.outboxes["b"] = Interrupted(a._sockets.outboxes["b"])
    with pytest.raises(KeyboardInterrupt):
        a.send("b", b"whole: it has one frame only", [torch.ones(3)])
    for _ in range(3):
        a.send("b", b"after", [torch.zeros(3)])
    payloads = [take(b).payload for _ in range(3)]
    assert payloads[-2:] == [b"after", b"after"]  # it may have left, or have been dropped with its connection
    assert b.num_refused == 0


def test_a_party_that_is_withdrawn_has_no_ring_here(pair: tuple[Any, Any], network: Network) -> None:
    a, b = pair
    exchange(a, b)
    b.withdraw("a")
    assert b._rings.readers == {}
    a.send("b", b"", [torch.ones(3)])
    while b.num_refused == 0:  # bounded by the test's time limit
        assert b.receive(0.005) is None
    b.authorise("a", network.keys["a"].public)
    for _ in range(2):
        exchange(a, b)  # over the socket, whose connection stays
    a.disconnect("b")
    a.connect("b", b.address, network.keys["b"].public)
    for _ in range(2):
        exchange(a, b)
    assert a.sent_shared_bytes == 2 * 4_000


def test_who_gets_another_key_gets_another_ring(pair: tuple[Any, Any], network: Network) -> None:
    a, b = pair
    exchange(a, b)
    second = network.open("second", [])
    b.authorise("a", network.keys["second"].public)
    second.connect("b", b.address, network.keys["b"].public)
    for _ in range(2):
        exchange(second, b)
    assert list(b._rings.readers) == [network.keys["second"].public]
    assert second.sent_shared_bytes == 4_000


def test_no_memory_for_a_message_loses_only_that(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    with monkeypatch.context() as patch:
        patch.setattr(
            "lingualinked.transport.wire.codec.allocate_tensor", lambda _, **__: (_ for _ in ()).throw(MemoryError())
        )
        a.send("b", b"", [torch.ones(3)])
        while b.num_refused == 0:
            assert b.receive(0.005) is None
    a._rings.writers["b"]._read_receipt()
    assert len(a._rings.writers["b"]._unread) == 0
    exchange(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine that can't pin memory")
def test_without_pinned_memory_messages_arrive_all_the_same(network: Network) -> None:
    """As where none is left, or where the device has failed: the step that needs it has to say so."""
    a, b = network.open("a", ["b"]), network.open("b", ["a"], serves_gpu=True)
    a.connect("b", b.address, network.keys["b"].public)
    for _ in range(3):
        exchange(a, b)
    assert b.received_shared_bytes == 2 * 4_000


def forged(network: Network, b: Any, *elements: object) -> None:
    """Let b receive a message of these elements from a; it is neither delivered nor does it harm b."""
    network.send_raw("a", b, [b"\x01" + msgspec.msgpack.encode(elements)])


TENSOR = [1, 100]  # 100 bytes


def test_hostile_places_and_offers_harm_nobody(pair: tuple[Any, Any], network: Network) -> None:
    a, b = pair
    exchange(a, b)
    token = next(iter(b._rings.readers[network.keys["a"].public]))
    num_refused = 0
    for place in (
        [b"x" * 16, 4_096, 2],
        [token, 0, 2],
        [token, 4_095, 2],
        [token, RING_BYTES + 4_096, 2],
        [token, RING_BYTES + 4_096 - 99, 2],
        [token, 2**64 - 1, 2],
        [token, -1, 2],
        [token, 4_096, 0],
        [token, 4_096, 256],
        [token, 4_096, 2**63],
        [token, 4_096],
        [token[:15], 4_096, 2],
        [None, None, None],
        "place",
    ):
        forged(network, b, b"", [TENSOR], 0, place, None)
        num_refused += 1
    for descriptors in ([[1, RING_BYTES + 1]], [[1, 2**31]], [[1, 2**62]], [[1, RING_BYTES // 2]] * 3, [[99, 100]]):
        forged(network, b, b"", descriptors, 0, [token, 4_096, 2], None)
        num_refused += 1
    network.send_raw(
        "a", b, [b"\x01" + msgspec.msgpack.encode((b"", [TENSOR], 0, [token, 4_096, 2], None)), bytes(100)]
    )
    num_refused += 1
    for offer in (
        [b"x" * 15, 1, 1, 1],
        [b"x" * 16, -1, 1, 1],
        [b"x" * 16, 1, 1, 0],
        [b"x" * 16, "1", 1, 1],
        [b"", 1],
        1,
    ):
        forged(network, b, b"", [], 0, None, offer)
        num_refused += 1
    for offer in (
        [b"x" * 16, 1, 1, 1],
        [b"x" * 16, os.getpid(), 0, 1],
        [b"x" * 16, os.getpid(), b._waker.fileno(), 1],
        [b"x" * 16, 2**64 - 1, 2**64 - 1, 1],
    ):
        forged(network, b, b"delivered", [], 0, None, offer)
    network.send_raw("a", b, VALID)
    payloads = []
    while payloads[-1:] != [b"valid"]:
        payloads.append(take(b).payload)
    assert payloads == [b"delivered"] * 4 + [b"valid"]
    assert b.num_refused == num_refused
    exchange(a, b)


def test_the_receivers_limit_holds_for_shared_memory_too(network: Network) -> None:
    a, b = network.open("a", ["b"]), network.open("b", ["a"], max_message_bytes=1 << 20)
    a.connect("b", b.address, network.keys["b"].public)
    exchange(a, b)
    a.send("b", b"", [torch.zeros(1 << 20, dtype=torch.uint8)])
    while b.num_refused == 0:  # bounded by the test's time limit
        assert b.receive(0.005) is None
    a._rings.writers["b"]._read_receipt()
    assert len(a._rings.writers["b"]._unread) == 0
    a.send("b", b"goes on", [torch.ones(1)])
    assert take(b).payload == b"goes on"
    assert b.num_refused == 1


def test_a_sender_can_not_pass_off_the_ring_of_another(network: Network) -> None:
    a, _, b = network.open_all("a", "hostile", "b")
    exchange(a, b)
    for writer in (a._rings.writers["b"], RingWriter("b")):
        writer.write([torch.ones(3)])
        pid, descriptor = os.getpid(), writer._file
        network.send_raw(
            "hostile", b, [b"\x01" + msgspec.msgpack.encode((b"", [], 0, None, (b"x" * 16, pid, descriptor, 9)))]
        )
        assert take(b).sender == "hostile"
        assert network.keys["hostile"].public not in b._rings.readers
    writer.close()
    exchange(a, b)
    assert b.received_shared_bytes == 4_000


PEER = """
    import sys, torch
    from lingualinked.transport.keys.keys import KeyPair
    from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox

    mine, other, address = KeyPair(*sys.argv[1:3]), sys.argv[3], sys.argv[4]
    with ZmqMailbox("peer", mine, socket_folder=sys.argv[5]) as box:
        box.authorise("me", other)
        box.connect("me", address, other)
        box.send("me", box.address.encode())
        while (delivery := box.receive(None)).payload != b"end":
            box.send("me", b"%d %d" % (box.received_shared_bytes, box.sent_shared_bytes), [delivery.tensors[0] + 1])
"""


def test_processes_exchange_megabytes_and_leave_nothing_when_killed(network: Network) -> None:
    mine, theirs = network.keys["me"], network.keys["peer"]
    box = network.open("me", ["peer"])
    arguments = [sys.executable, "-c", textwrap.dedent(PEER), theirs.public, theirs.secret, mine.public, box.address]
    arguments.append(str(Path(box.address.removeprefix("ipc://")).parent))  # where its socket is removed by this side
    before = open_memory()
    with subprocess.Popen(arguments) as peer:
        try:
            box.connect("peer", take(box).payload.decode(), theirs.public)
            for _ in range(4):
                tensor = torch.randint(0, 255, (8 << 20,), dtype=torch.uint8)
                box.send("peer", b"", [tensor])
                tensor += 1
                assert torch.equal(take(box).tensors[0], tensor)
            assert box.sent_shared_bytes == box.received_shared_bytes == 3 * (8 << 20)
        finally:
            peer.send_signal(signal.SIGKILL)
    for _ in range(20):  # the ring is soon full: nobody reads
        box.send("peer", b"", [tensor])
    box.disconnect("peer")
    assert open_memory() == before


def open_memory() -> int:
    """Return how many descriptors of shared memory this process holds."""
    num_open = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            num_open += str(each.readlink()).startswith("/memfd:")
    return num_open


def test_a_mailbox_that_is_dropped_closes_its_memory(network: Network) -> None:
    before = open_memory()
    a, b = network.open_all("a", "b")
    exchange(a, b)
    exchange(a, b)
    assert open_memory() == before + 3  # a file and its map, and the receiver's
    network._mailboxes.clear()
    del a, b
    gc.collect()
    assert open_memory() == before


def test_a_forked_child_closes_no_memory_of_its_parent(pair: tuple[Any, Any]) -> None:
    a, b = pair
    child = os.fork()
    if child == 0:
        a.close()
        b.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    exchange(a, b)
    assert a.sent_shared_bytes == 4_000


def test_threads_that_own_a_mailbox_each_exchange_at_once(network: Network) -> None:
    a, b = network.open_all("a", "b")
    failures: list[BaseException] = []

    def run(mine: Any, other: str) -> None:
        try:
            for number in range(200):
                mine.send(other, b"%d" % number, [torch.full((20_000,), number)])
                delivery = take(mine)
                assert delivery.tensors[0].unique().tolist() == [int(delivery.payload)]
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=run, args=(a, "b")), threading.Thread(target=run, args=(b, "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert failures == []
    assert a.sent_shared_bytes > 100 * 160_000

"""What every mailbox does, whatever carries the messages."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import weakref
from typing import Any

import pytest
import torch

from contract.network import WAIT_S, Network
from lingualinked.errors import ArgumentError, ClosedError, PeerUnknownError, ProtocolError
from lingualinked.transport.wire.codec import WIRE_VERSION, Limits, encode_message

VALID = [bytes(frame) for frame in encode_message(b"valid", [torch.arange(3)], Limits())]
APART = [bytes(frame) for frame in encode_message(b"valid", [torch.arange(3)], Limits(max_frame_bytes=64))]


def take(mailbox: Any) -> Any:
    delivery = mailbox.receive(WAIT_S)
    assert delivery is not None
    return delivery


def test_a_message_arrives_as_it_was_sent(network: Network) -> None:
    a, b = network.open_all("a", "b")
    tensors = [
        torch.randn(2, 3, 4).to(torch.bfloat16).transpose(0, 2),
        torch.tensor(7),
        torch.empty(0, 5),
        torch.tensor([True, False]),
    ]
    for _ in range(3):
        num_bytes = a.send("b", b"payload", tensors)
        delivery = take(b)
        assert (delivery.sender, delivery.payload, delivery.num_bytes) == ("a", b"payload", num_bytes)
        assert len(delivery.tensors) == len(tensors)
        for received, sent in zip(delivery.tensors, tensors, strict=True):
            assert received.dtype == sent.dtype
            assert torch.equal(received, sent)
            assert received.is_contiguous()
        num_more = num_bytes - (len(encode_message(b"payload", tensors, Limits())[0]) + 48 + 8 + 0 + 2)
        assert 0 <= num_more <= (64 if network.kind == "ipc" else 0)  # that say where shared memory is


def test_a_message_without_tensors_and_an_empty_payload(network: Network) -> None:
    a, b = network.open_all("a", "b")
    a.send("b", b"")
    delivery = take(b)
    assert (delivery.payload, delivery.tensors) == (b"", ())


def test_messages_of_a_sender_keep_their_order(network: Network) -> None:
    names = ("a", "b", "c")
    *senders, receiver = network.open_all(*names, "r")
    for number in range(100):
        for sender in senders:
            sender.send("r", b"%d" % number, [torch.full((2,), number)])
    numbers: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(300):
        delivery = take(receiver)
        assert delivery.tensors[0].tolist() == [int(delivery.payload)] * 2
        numbers[delivery.sender].append(int(delivery.payload))
    assert numbers == {name: list(range(100)) for name in names}


def test_messages_sent_at_once_after_connect_wait_for_the_connection(network: Network) -> None:
    a, b = network.open("a", ["b"]), network.open("b", ["a"])
    a.connect("peer", b.address, network.keys["b"].public)
    for number in range(20):
        a.send("peer", b"%d" % number)
    assert [int(take(b).payload) for _ in range(20)] == list(range(20))


def test_the_receivers_name_for_the_key_is_the_sender(network: Network) -> None:
    a = network.open("calls itself a", [])
    network.keys["a"] = network.keys["calls itself a"]
    b = network.open("b", ["a"])
    a.connect("b", b.address, network.keys["b"].public)
    a.send("b", b"")
    assert take(b).sender == "a"


def test_a_mailbox_can_send_to_itself(network: Network) -> None:
    (a,) = network.open_all("a")
    a.send("a", b"note", [torch.ones(3)])
    assert take(a).sender == "a"


def test_no_sender_starves_another(network: Network) -> None:
    loud, quiet, receiver = network.open_all("loud", "quiet", "receiver")
    stop = threading.Event()
    room = threading.Semaphore(500)

    def flood() -> None:
        while not stop.is_set():
            if room.acquire(timeout=0.1):
                loud.send("receiver", b"again")

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        assert take(receiver).sender == "loud"
        quiet.send("receiver", b"once")
        while take(receiver).sender != "quiet":  # bounded by the test's time limit
            room.release()
    finally:
        stop.set()
        thread.join(WAIT_S)


def test_large_tensors_are_split_into_frames(network: Network) -> None:
    a, b = network.open_all("a", "b", max_frame_bytes=1_000)
    tensors = [torch.randn(2_501), torch.arange(125), torch.randn(3)]  # 10,004 bytes: 11 frames; exactly one; one
    num_bytes = a.send("b", b"x", tensors)
    delivery = take(b)
    assert all(map(torch.equal, delivery.tensors, tensors))
    assert delivery.num_bytes == num_bytes > 10_004 + 1_000 + 12


def test_a_message_of_many_frames_is_as_good_as_any(network: Network) -> None:
    a, b = network.open_all("a", "b")
    tensor = torch.arange(3 << 20, dtype=torch.uint8)
    a.send("b", b"", [tensor])
    a.send("b", b"next")
    assert torch.equal(take(b).tensors[0], tensor)
    assert take(b).payload == b"next"


def test_a_payload_may_fill_a_frame_and_no_more(network: Network) -> None:
    a, b = network.open_all("a", "b", max_frame_bytes=1_000)
    overhead = a.send("b", bytes(256)) - 256
    take(b)
    a.send("b", bytes(1_000 - overhead))
    assert len(take(b).payload) == 1_000 - overhead
    with pytest.raises(ProtocolError, match=r"1,001 B, which exceeds max_frame_bytes \(1,000 B\)"):
        a.send("b", bytes(1_001 - overhead))
    a.send("b", b"goes on")
    assert take(b).payload == b"goes on"


def test_nothing_is_sent_of_a_message_that_is_too_large(network: Network) -> None:
    a, b = network.open_all("a", "b", max_frame_bytes=1_000, max_message_bytes=5_000)
    with pytest.raises(ProtocolError, match=r"exceeds max_message_bytes \(4\.9 KiB\)"):
        a.send("b", b"", [torch.zeros(4_000, dtype=torch.uint8), torch.zeros(1_000, dtype=torch.uint8)])
    a.send("b", b"goes on")
    assert take(b).payload == b"goes on"
    assert b.num_refused == 0


def test_a_receiver_with_lower_limits_is_not_harmed(network: Network) -> None:
    a = network.open("a", [])
    b = network.open("b", ["a"], max_message_bytes=2 << 20)
    a.connect("b", b.address, network.keys["b"].public)
    a.send("b", b"", [torch.zeros(3 << 20, dtype=torch.uint8)])
    a.send("b", b"goes on")
    assert take(b).payload == b"goes on"
    assert b.num_refused == 1


def test_a_tensor_may_change_after_send_and_after_receive(network: Network) -> None:
    a, b = network.open_all("a", "b")
    for num_elements in (10, 1 << 20):
        tensor = torch.zeros(num_elements)
        a.send("b", b"", [tensor])
        tensor.fill_(1)
        a.send("b", b"", [tensor])
        first, second = take(b).tensors[0], take(b).tensors[0]
        assert not first.any()
        first.fill_(5)
        assert torch.equal(second, tensor)


def test_a_wake_ends_the_wait_of_another_thread(network: Network) -> None:
    (a,) = network.open_all("a")
    about_to_wait = threading.Event()

    def wake() -> None:
        about_to_wait.wait(WAIT_S)
        a.wake()

    thread = threading.Thread(target=wake)
    thread.start()
    about_to_wait.set()
    assert a.receive(None) is None
    thread.join(WAIT_S)


def test_a_wake_before_receive_comes_before_messages_and_counts_once(network: Network) -> None:
    (a,) = network.open_all("a")
    a.send("a", b"1")
    for _ in range(3):
        a.wake()
    assert a.receive(None) is None
    assert take(a).payload == b"1"
    a.wake()
    assert a.receive(None) is None
    a.send("a", b"2")
    assert take(a).payload == b"2"


def test_many_wakes_do_no_harm(network: Network) -> None:
    (a,) = network.open_all("a")
    for _ in range(2_000):
        a.wake()
    a.send("a", b"1")
    assert a.receive(None) is None
    assert take(a).payload == b"1"


def test_a_finalizer_may_wake(network: Network) -> None:
    (a,) = network.open_all("a")

    class Model:
        pass

    model = Model()
    weakref.finalize(model, a.wake)
    del model
    gc.collect()
    assert a.receive(None) is None


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_signal_handler_may_wake(network: Network) -> None:
    (a,) = network.open_all("a")
    before = signal.signal(signal.SIGUSR1, lambda *_: a.wake())
    thread = threading.Timer(0, signal.pthread_kill, [threading.main_thread().ident, signal.SIGUSR1])
    try:
        thread.start()
        assert a.receive(None) is None
    finally:
        thread.join(WAIT_S)
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupt_passes_and_the_mailbox_goes_on(network: Network) -> None:
    (a,) = network.open_all("a")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Timer(0, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (it may strike anywhere in here)
            thread.start()
            while True:
                a.receive(None)
    finally:
        thread.join(WAIT_S)
        signal.signal(signal.SIGINT, before)
    a.send("a", b"goes on")
    assert take(a).payload == b"goes on"


@pytest.mark.parametrize("timeout_s", [0, 0.005, -1.0])
def test_receive_gives_up(network: Network, timeout_s: float) -> None:
    (a,) = network.open_all("a")
    assert a.receive(timeout_s) is None


def test_a_very_long_timeout_is_no_error(network: Network) -> None:
    (a,) = network.open_all("a")
    a.send("a", b"1")
    assert a.receive(float("inf")).payload == b"1"
    a.send("a", b"2")
    assert a.receive(1e9).payload == b"2"


def test_receive_without_waiting_takes_what_is_there(network: Network) -> None:
    (a,) = network.open_all("a")
    a.send("a", b"1")
    a.send("a", b"2")
    take(a)
    for _ in range(1_000_000):  # the second message may still be on its way
        delivery = a.receive(0)
        if delivery is not None:
            break
    assert delivery is not None
    assert delivery.payload == b"2"


def test_an_unknown_peer_is_an_error(network: Network) -> None:
    a, _ = network.open_all("a", "b")
    with pytest.raises(PeerUnknownError, match=r"not connected to 'nobody' \(connected peers: 'a', 'b'\)"):
        a.send("nobody", b"")


def test_a_closed_mailbox_refuses_everything_but_wake_and_close(network: Network) -> None:
    a, b = network.open_all("a", "b")
    b.close()
    for call in (
        lambda: b.send("a", b""),
        lambda: b.receive(0),
        lambda: b.connect("a", a.address, network.keys["a"].public),
        lambda: b.disconnect("a"),
    ):
        with pytest.raises(ClosedError, match="mailbox 'b' is closed"):
            call()
    b.wake()
    b.close()
    assert "closed" in repr(b)
    a.send("b", b"to nobody")  # a peer that is gone is not this side's error


def test_a_mailbox_is_a_context_manager(network: Network) -> None:
    with network.open("a", []) as a:
        assert a.address in repr(a)
    with pytest.raises(ClosedError):
        a.receive(0)


def test_addresses_are_not_used_again(network: Network) -> None:
    first = network.open("a", [])
    first.close()
    assert network.open("a", []).address != first.address


def test_connecting_twice_changes_nothing(network: Network) -> None:
    a, b = network.open_all("a", "b")
    a.connect("b", b.address, network.keys["b"].public)
    a.send("b", b"1")
    a.send("b", b"2")
    assert [take(b).payload, take(b).payload] == [b"1", b"2"]


def test_a_name_stands_for_one_peer_at_a_time(network: Network) -> None:
    a, _, c = network.open_all("a", "b", "c")
    with pytest.raises(ArgumentError, match=r"connected to 'b' at .* already.*disconnect\('b'\) first"):
        a.connect("b", c.address, network.keys["c"].public)
    a.disconnect("b")
    a.disconnect("b")
    with pytest.raises(PeerUnknownError):
        a.send("b", b"")
    a.connect("b", c.address, network.keys["c"].public)
    a.send("b", b"to c")
    assert take(c).payload == b"to c"


def test_a_peer_can_be_connected_again(network: Network) -> None:
    a, b = network.open_all("a", "b")
    a.send("b", b"1")
    take(b)
    a.disconnect("b")
    a.connect("b", b.address, network.keys["b"].public)
    a.send("b", b"2")
    assert take(b).payload == b"2"


def test_what_is_no_address_or_key_is_an_error(network: Network) -> None:
    a = network.open("a", [])
    with pytest.raises(ArgumentError, match="'nonsense'"):
        a.connect("b", "nonsense", network.keys["b"].public)
    with pytest.raises(ArgumentError, match="'nonsense' is not a public key"):
        a.connect("b", a.address, "nonsense")
    with pytest.raises(PeerUnknownError):
        a.send("b", b"")


def test_an_unauthorised_key_never_gets_in(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    a, b = network.open_all("a", "b")
    outsiders = [network.open(f"outsider {number}", ["a", "b"]) for number in range(2)]
    for outsider in outsiders:
        outsider.connect("b", b.address, network.keys["b"].public)
        with pytest.raises(ProtocolError, match="'b' refused the connection"):  # noqa: PT012 (at some send)
            while True:  # how soon the refusal is known is not said; bounded by the test's time limit
                outsider.send("b", b"let me in")
                assert b.receive(0.005) is None
    a.send("b", b"authorised")
    assert take(b).payload == b"authorised"
    assert b.receive(0) is None
    assert b.num_refused == 2
    records = [record for record in caplog.records if record.name == "lingualinked.transport"]
    assert [record.levelno for record in records] == [logging.WARNING]
    assert "not authorised" in records[0].getMessage()


def test_a_key_may_be_authorised_while_the_mailbox_is_used(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    a, b = network.open_all("a", "b")
    late = network.open("late", [])
    a.send("b", b"before")
    for _ in range(2):  # the second time changes nothing
        b.authorise("newcomer", network.keys["late"].public)
    late.connect("b", b.address, network.keys["b"].public)
    late.send("b", b"", [torch.arange(3)])
    assert {take(b).sender for _ in range(2)} == {"a", "newcomer"}
    a.send("b", b"after")
    assert (take(b).payload, b.num_refused, caplog.records) == (b"after", 0, [])


def test_who_was_refused_gets_in_by_a_new_connection(network: Network) -> None:
    _, b = network.open_all("a", "b")
    early = network.open("early", [])
    early.connect("b", b.address, network.keys["b"].public)
    with pytest.raises(ProtocolError, match="'b' refused the connection"):  # noqa: PT012 (at some send)
        while True:
            early.send("b", b"too early")
            assert b.receive(0.005) is None
    b.authorise("early", network.keys["early"].public)
    early.disconnect("b")
    early.connect("b", b.address, network.keys["b"].public)
    early.send("b", b"in time")
    assert (take(b).payload, b.num_refused) == (b"in time", 1)


def test_a_name_that_gets_another_key_is_taken_from_who_had_it(network: Network) -> None:
    a, b, _ = network.open_all("a", "b", "c")
    second = network.open("second", [])
    a.send("b", b"1")
    assert take(b).payload == b"1"
    b.authorise("a", network.keys["second"].public)
    a.send("b", b"2")
    while b.num_refused == 0:  # bounded by the test's time limit
        assert b.receive(0.005) is None
    second.connect("b", b.address, network.keys["b"].public)
    second.send("b", b"3")
    delivery = take(b)
    assert (delivery.sender, delivery.payload) == ("a", b"3")
    b.authorise("a again", network.keys["a"].public)  # its connection stands
    a.send("b", b"4")
    delivery = take(b)
    assert (delivery.sender, delivery.payload) == ("a again", b"4")


def test_what_can_not_be_authorised_is_an_error(network: Network) -> None:
    _, b = network.open_all("a", "b")
    with pytest.raises(ArgumentError, match="'nonsense' is not a public key"):
        b.authorise("c", "nonsense")
    with pytest.raises(ArgumentError, match="is authorised as 'a': 'c' needs a key of its own"):
        b.authorise("c", network.keys["a"].public)
    b.close()
    with pytest.raises(ClosedError):
        b.authorise("c", network.keys["c"].public)


def test_a_peer_with_another_key_gets_nothing(network: Network) -> None:
    a, b = network.open_all("a", "b")
    a.connect("impostor", b.address, network.keys["somebody else"].public)
    a.send("impostor", b"secret")
    a.send("b", b"1")
    assert take(b).payload == b"1"
    assert b.receive(0) is None


@pytest.mark.parametrize(
    ("kind", "frames"),
    [
        ("version", [b""]),
        ("version", [bytes([WIRE_VERSION + 1]) + APART[0][1:], APART[1]]),
        ("envelope", [APART[0][:-1], APART[1]]),
        ("envelope", [b"\x01\x80"]),
        ("tensor bytes", [APART[0]]),
        ("tensor bytes", [APART[0], APART[1][:-1]]),
        ("tensor bytes", [*APART, b""]),
        ("tensor bytes", [APART[0], b"", APART[1]]),
        ("envelope", [VALID[0][:-1]]),
        ("tensor bytes", [VALID[0], APART[1]]),
        ("tensor bytes", [VALID[0], b""]),
    ],
)
def test_malformed_messages_are_dropped_counted_and_logged_once(
    network: Network, caplog: pytest.LogCaptureFixture, kind: str, frames: list[bytes]
) -> None:
    a, b, _ = network.open_all("a", "b", "c")
    for _ in range(3):
        network.send_raw("c", b, frames)
    network.send_raw("c", b, VALID)  # the same connection: arrives after them
    assert take(b).payload == b"valid"
    assert b.num_refused == 3
    a.send("b", b"goes on")
    assert take(b).sender == "a"
    records = [record.getMessage() for record in caplog.records if record.name == "lingualinked.transport"]
    assert len(records) == 1
    assert f"refused input from c ({kind})" in records[0]


def test_a_flood_of_malformed_messages_outlasts_no_time_limit(network: Network) -> None:
    a, b = network.open_all("a", "b")
    a.send("b", b"before")
    for _ in range(500):
        network.send_raw("a", b, [b""])
    network.send_raw("a", b, VALID)
    heard: list[bytes] = []
    while len(heard) < 2:
        num_refused, delivery = b.num_refused, b.receive(0)
        assert b.num_refused <= num_refused + 1
        heard += [] if delivery is None else [delivery.payload]
    assert set(heard) == {b"before", b"valid"}
    assert b.num_refused == 500


def test_random_bytes_from_an_authorised_peer_do_no_harm(network: Network) -> None:
    _, b = network.open_all("a", "b")
    generator = torch.Generator().manual_seed(0)

    def random_bytes() -> bytes:
        length = int(torch.randint(0, 40, (), generator=generator))
        return bytes(torch.randint(0, 256, (length,), generator=generator).tolist())

    for number in range(300):
        head = bytes([WIRE_VERSION]) * (number % 2) + random_bytes()
        network.send_raw("a", b, [head, *[random_bytes() for _ in range(number % 4)]])
    network.send_raw("a", b, VALID)
    delivery = take(b)
    while delivery.payload != b"valid":
        delivery = take(b)
    assert b.num_refused > 200


def test_opening_and_closing_leaves_nothing(network: Network) -> None:
    def belongings() -> tuple[int, int]:
        fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208
        return len(threading.enumerate()), fds

    before = belongings()
    for _ in range(5):
        a, b = network.open_all("a", "b")
        a.send("b", b"read")
        take(b)
        a.send("b", b"unread", [torch.zeros(1 << 20)])
        a.close()
        b.close()
    assert belongings() == before


def test_a_mailbox_that_is_dropped_closes_itself(network: Network) -> None:
    before = set(threading.enumerate())
    (a,) = network.open_all("a")
    a.send("a", b"unread")
    dropped = weakref.ref(a)
    network._mailboxes.clear()
    del a
    gc.collect()
    assert dropped() is None
    assert set(threading.enumerate()) == before


def test_another_thread_may_close_once_the_owner_has_ended(network: Network) -> None:
    owned: list[Any] = []
    owner = threading.Thread(target=lambda: owned.extend(network.open_all("a", "b")))
    owner.start()
    owner.join(WAIT_S)
    for mailbox in owned:
        mailbox.close()
    with pytest.raises(ClosedError):
        owned[0].receive(0)

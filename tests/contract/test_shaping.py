"""An emulated link delays, serialises and loses nothing, over every transport."""

from __future__ import annotations

import time

import pytest
import torch

from contract.network import Network


def test_messages_arrive_in_order_after_transfer_and_latency(network: Network) -> None:
    sender, receiver = network.open_all("sender", "receiver")
    receiver.expect_delays(["sender"])
    sender.shape_link(receiver.name, 1e6, 0.02)
    started = time.monotonic()
    for number in range(3):
        sender.send(receiver.name, bytes([number]), [torch.zeros(10_000, dtype=torch.uint8)])
    arrivals = []
    for number in range(3):
        delivery = receiver.receive(10)
        assert delivery is not None
        assert delivery.payload == bytes([number])
        arrivals.append(time.monotonic() - started)
    for number, arrival in enumerate(arrivals, start=1):
        assert arrival >= 0.02 + number * 10_000 / 1e6  # never early; how late is the machine's affair


def test_what_is_not_due_is_not_received(network: Network) -> None:
    sender, receiver = network.open_all("sender", "receiver")
    receiver.expect_delays(["sender"])
    sender.shape_link(receiver.name, float("inf"), 0.2)
    sender.send(receiver.name, b"later")
    assert receiver.receive(0.01) is None
    delivery = receiver.receive(10)
    assert delivery is not None
    assert delivery.payload == b"later"


def test_a_wake_ends_the_wait_for_what_is_held(network: Network) -> None:
    sender, receiver = network.open_all("sender", "receiver")
    receiver.expect_delays(["sender"])
    sender.shape_link(receiver.name, float("inf"), 60.0)
    sender.send(receiver.name, b"in a minute")
    assert receiver.receive(0.05) is None
    receiver.wake()
    assert receiver.receive(60) is None


def test_a_link_that_becomes_faster_lets_nothing_overtake(network: Network) -> None:
    sender, receiver = network.open_all("sender", "receiver")
    receiver.expect_delays(["sender"])
    sender.shape_link(receiver.name, float("inf"), 0.1)
    sender.send(receiver.name, b"first")
    sender.shape_link(receiver.name, float("inf"), 0.0)
    sender.send(receiver.name, b"second")
    payloads = [delivery.payload for _ in range(2) if (delivery := receiver.receive(10)) is not None]
    assert payloads == [b"first", b"second"]


@pytest.mark.parametrize("shaped", [False, True])
def test_a_message_that_is_not_held_does_not_wait_for_one_that_is(network: Network, shaped: bool) -> None:
    slow, fast, receiver = network.open_all("slow", "fast", "receiver")
    receiver.expect_delays(["slow", "fast"])
    slow.shape_link("receiver", float("inf"), 30.0)
    if shaped:
        fast.shape_link("receiver", float("inf"), 0.01)
    slow.send("receiver", b"slow")
    fast.send("receiver", b"fast")
    delivery = receiver.receive(20)
    assert delivery is not None
    assert delivery.payload == b"fast"


def test_only_links_that_are_emulated_delay_and_none_by_more_than_a_minute(network: Network) -> None:
    sender, receiver = network.open_all("sender", "receiver")
    sender.shape_link(receiver.name, float("inf"), 3600.0)
    sender.send(receiver.name, b"at once")
    delivery = receiver.receive(20)
    assert delivery is not None
    assert (delivery.payload, delivery.due_s, receiver.num_refused) == (b"at once", 0.0, 1)
    receiver.expect_delays(["sender"])
    sender.send(receiver.name, b"in a minute")
    assert receiver.receive(0.1) is None
    assert receiver.num_refused == 2
    assert receiver._delayed.next_due_in_s <= 60


def test_what_is_held_of_one_sender_is_bounded(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.transport.mailbox._MAX_DELAYED_BYTES", 3_000_000)
    sender, receiver = network.open_all("sender", "receiver")
    receiver.expect_delays(["sender"])
    sender.shape_link(receiver.name, float("inf"), 30.0)
    for _ in range(5):
        sender.send(receiver.name, b"later", [torch.zeros(1_000_000, dtype=torch.uint8)])
    while receiver.num_refused < 3:
        assert receiver.receive(0.05) is None
    assert 2_000_000 <= receiver._delayed.num_bytes("sender") < 3_000_000


def test_a_link_that_is_plain_again_delays_nothing(network: Network) -> None:
    sender, receiver = network.open_all("sender", "receiver")
    sender.shape_link(receiver.name, float("inf"), 0.01)
    sender.shape_link(receiver.name, float("inf"), 0.0)
    sender.send(receiver.name, b"plain")
    assert receiver.receive(20) is not None
    assert receiver.num_refused == 0

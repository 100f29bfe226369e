"""A worker exchanges messages only with workers that the caller has introduced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lingualinked.errors import ArgumentError, PeerUnknownError, ProtocolError
from lingualinked.protocol.measuring import Pong
from lingualinked.protocol.messages import DismissWorker, IntroduceWorker, decode
from lingualinked.transport.inprocess import InProcessHub, InProcessMailbox
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.worker.messaging.peers import Peers


@pytest.fixture
def boxes() -> Iterator[dict[str, InProcessMailbox]]:
    hub = InProcessHub()
    keys = {name: generate_keypair() for name in ("me", "caller", "a", "b")}
    boxes = {name: InProcessMailbox(hub, name, keys[name]) for name in ("caller", "a", "b")}
    boxes["me"] = InProcessMailbox(hub, "me", keys["me"], is_open=False)
    boxes["me"].authorise("caller", keys["caller"].public)
    yield boxes
    for box in boxes.values():
        box.close()


def introduction(box: InProcessMailbox, name: str | None = None) -> IntroduceWorker:
    return IntroduceWorker(request=1, name=name or box.name, public_key=box.public_key, address=box.address)


def test_who_is_introduced_is_heard_and_reached(boxes: dict[str, InProcessMailbox]) -> None:
    me, other = boxes["me"], boxes["a"]
    peers = Peers(me)
    other.connect("me", me.address, me.public_key)  # refused, as every connection before the introduction
    with pytest.raises(PeerUnknownError):
        peers.send("a", Pong(number=1))
    assert "a" not in peers
    for _ in range(2):
        peers.introduce(introduction(other))
    assert "a" in peers
    peers.send("a", Pong(number=1))
    delivery = other.receive(1)
    assert delivery is not None
    assert decode(delivery.payload) == Pong(number=1)


def test_a_name_keeps_its_key_and_address(boxes: dict[str, InProcessMailbox]) -> None:
    me, other, another = boxes["me"], boxes["a"], boxes["b"]
    peers = Peers(me)
    peers.introduce(introduction(other))
    for wrong in (
        introduction(another, "a"),
        IntroduceWorker(request=1, name="a", public_key=other.public_key, address=another.address),
        IntroduceWorker(request=1, name="a", public_key=another.public_key, address=other.address),
        introduction(another, "me"),
    ):
        with pytest.raises(ProtocolError, match="known with another address or key"):
            peers.introduce(wrong)
    with pytest.raises(ArgumentError):  # of one who is known by another name
        peers.introduce(introduction(other, "b"))
    peers.send("a", Pong(number=1))
    assert other.receive(1) is not None
    assert another.receive(0) is None


def test_who_is_dismissed_is_neither_heard_nor_reached(boxes: dict[str, InProcessMailbox]) -> None:
    me, other, another = boxes["me"], boxes["a"], boxes["b"]
    peers = Peers(me)
    peers.introduce(introduction(other))
    other.connect("me", me.address, me.public_key)
    peers.send("a", Pong(number=1))
    for _ in range(2):
        peers.dismiss(DismissWorker(name="a"))
    other.send("me", b"still here")
    assert me.receive(0) is None
    assert me.num_refused == 1
    with pytest.raises(PeerUnknownError):
        peers.send("a", Pong(number=2))
    peers.introduce(introduction(another, "a"))
    peers.send("a", Pong(number=3))
    assert another.receive(1) is not None


def test_a_worker_may_be_its_own_next_stage(boxes: dict[str, InProcessMailbox]) -> None:
    me = boxes["me"]
    peers = Peers(me)
    peers.send("me", Pong(number=1))
    delivery = me.receive(1)
    assert delivery is not None
    assert delivery.sender == "me"

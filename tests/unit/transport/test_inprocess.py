from __future__ import annotations

import torch

from lingualinked.transport.inprocess import InProcessHub, InProcessMailbox


def test_without_keys_everybody_of_the_hub_is_known_by_the_own_name() -> None:
    hub = InProcessHub()
    with InProcessMailbox(hub, "a") as a, InProcessMailbox(hub, "b") as b:
        a.connect("peer", b.address, b.public_key)
        a.send("peer", b"payload", [torch.arange(3)])
        delivery = b.receive(0)
        assert delivery is not None
        assert (delivery.sender, delivery.payload, delivery.tensors[0].tolist()) == ("a", b"payload", [0, 1, 2])


def test_mailboxes_of_another_hub_are_out_of_reach() -> None:
    with InProcessMailbox(InProcessHub(), "a") as a, InProcessMailbox(InProcessHub(), "b") as b:
        a.connect("b", b.address, b.public_key)
        a.send("b", b"payload")
        assert b.receive(0) is None


def test_a_hub_keeps_no_mailbox_alive() -> None:
    hub = InProcessHub()
    a = InProcessMailbox(hub, "a")
    address, public_key = a.address, a.public_key
    assert hub.find(address, public_key) is a
    del a
    assert hub.find(address, public_key) is None

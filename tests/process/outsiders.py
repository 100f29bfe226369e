"""A party that a cluster has authorised and introduced, that has no part in any plan, and says whatever it likes.

Knows the protocol; not what it is answered.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

import lingualinked as ll
from lingualinked.model.process.environment_probe import read_environment
from lingualinked.protocol.measuring import Ping, Pong
from lingualinked.protocol.messages import Acknowledged, Hello, IntroduceWorker, decode, encode
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox
from lingualinked.transport.wire.delivery import Delivery
from waiting import wait_until


class Outsider:
    """Plays one more worker of a cluster; a context manager."""

    name = "outsider"

    def __init__(self, cluster: ll.Cluster) -> None:
        cluster.wait()
        self._engine = engine = cluster._engine
        self._pings = itertools.count(10**9)
        self.heard: list[Delivery] = []
        self.num_workers = len(cluster.devices)
        address, key = engine.peer("caller")
        keys = generate_keypair()
        self.mailbox = ZmqMailbox(self.name, keys, socket_folder=cluster._workers.socket_folder)
        self.mailbox.authorise("caller", key)
        engine.expect_worker(self.name)
        engine.authorise_worker(self.name, keys.public)
        self.mailbox.connect("caller", address, key)
        self.send("caller", encode(Hello(pid=1, address=self.mailbox.address, environment=read_environment())))
        introductions: list[IntroduceWorker] = []
        while len(introductions) < self.num_workers:
            delivery = self.mailbox.receive(30)
            assert delivery is not None
            introduction = decode(delivery.payload)
            assert isinstance(introduction, IntroduceWorker)
            self.mailbox.authorise(introduction.name, introduction.public_key)
            self.send("caller", encode(Acknowledged(request=introduction.request)))
            introductions.append(introduction)
        wait_until(engine._exchange.settled[self.name].is_set)
        for introduction in introductions:  # only now do all know this one's key: a refusal is final
            self.mailbox.connect(introduction.name, introduction.address, introduction.public_key)

    def send(self, to: str, payload: bytes, tensors: Sequence[torch.Tensor] = ()) -> None:
        self.mailbox.send(to, payload, tensors)

    def send_frames(self, to: str, frames: Sequence[bytes]) -> None:
        """Send what need not be a message at all."""
        self.mailbox._sockets.outboxes[to].send_multipart(list(frames))

    def see_through(self, to: str) -> None:
        """Wait until all that was sent to a party has been taken: a Ping is answered behind it."""
        number = next(self._pings)
        self.send(to, encode(Ping(number=number)))
        while True:
            delivery = self.mailbox.receive(60)
            assert delivery is not None, f"{to} is deaf"
            if delivery.sender == to and decode(delivery.payload) == Pong(number=number):
                return
            self.heard.append(delivery)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine.drop_worker(self.name)
        self.mailbox.close()

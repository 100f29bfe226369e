"""Mailboxes that know each other, for the tests of this folder.

Knows the three ways there are to carry messages, and how to send what is no message over each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import zmq

from lingualinked.transport.inprocess import InProcessHub, InProcessMailbox
from lingualinked.transport.keys.keys import KeyPair, generate_keypair
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox

WAIT_S = 30.0  # of what is sure to come: a bound, never reached


class Network:
    """Opens mailboxes, knows all keys, and closes all mailboxes in the end."""

    def __init__(self, kind: Literal["inprocess", "ipc", "tcp"]) -> None:
        self.kind = kind
        self.keys: defaultdict[str, KeyPair] = defaultdict(generate_keypair)
        self._hub = InProcessHub()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._raw: dict[tuple[str, str], zmq.Socket[bytes]] = {}
        self._mailboxes: list[Mailbox] = []

    def open(self, name: str, authorised: Sequence[str], **limits: int) -> Any:
        """Open one mailbox, not connected to anyone."""
        mailbox: Mailbox
        if self.kind == "inprocess":
            mailbox = InProcessMailbox(self._hub, name, self.keys[name], is_open=False, **limits)
        else:
            is_local = self.kind == "ipc"
            mailbox = ZmqMailbox(name, self.keys[name], ipc=is_local, shared_memory=is_local, **limits)
        self._mailboxes.append(mailbox)
        for other in authorised:
            mailbox.authorise(other, self.keys[other].public)
        return mailbox

    def open_all(self, *names: str, **limits: int) -> list[Any]:
        """Open mailboxes that are all connected to all, themselves included."""
        mailboxes = [self.open(name, names, **limits) for name in names]
        for mailbox in mailboxes:
            for other in mailboxes:
                mailbox.connect(other.name, other.address, self.keys[other.name].public)
        return mailboxes

    def send_raw(self, sender: str, receiver: Any, frames: Sequence[bytes]) -> None:
        """Send frames as they are, with an encrypted connection of the sender's key."""
        if self.kind == "inprocess":
            receiver.accept_frames(self.keys[sender].public, frames)
            return
        if self._context is None:
            self._context = zmq.Context()
        socket = self._raw.get((sender, receiver.name))
        if socket is None:
            socket = self._raw[sender, receiver.name] = self._context.socket(zmq.PUSH)
            socket.sndhwm = 0
            socket.curve_serverkey = self.keys[receiver.name].public.encode()
            socket.curve_publickey = self.keys[sender].public.encode()
            socket.curve_secretkey = self.keys[sender].secret.encode()
            socket.connect(receiver.address)
        socket.send_multipart(frames, zmq.DONTWAIT)

    def close(self) -> None:
        for mailbox in self._mailboxes:
            mailbox.close()
        self._mailboxes.clear()
        if self._context is not None:
            self._context.destroy(linger=0)

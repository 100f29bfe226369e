"""Mailboxes within one process: a test double for whatever communicates through mailboxes.

Knows no sockets and no encryption; messages go through the same codec, keys and limits as over ZeroMQ.
"""

from __future__ import annotations

import math
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lingualinked.errors import ArgumentError
from lingualinked.public_key import raw_key
from lingualinked.transport.keys.keys import KeyPair, generate_keypair
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.wire.codec import (
    Limits,
    MalformedError,
    decode_message,
    encode_message,
)
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.transport.wire.message_limits import DEFAULT_MAX_FRAME_BYTES, DEFAULT_MAX_MESSAGE_BYTES
from lingualinked.transport.wire.refusals import Refusals

if TYPE_CHECKING:
    from torch import Tensor

    from lingualinked.transport.sockets.tcp_listener import TcpEndpoint

_SCHEME = "inprocess://"


class InProcessHub:
    """Where the mailboxes of one process find each other; holds weak references only."""

    def __init__(self) -> None:
        self._mailboxes: weakref.WeakValueDictionary[str, InProcessMailbox] = weakref.WeakValueDictionary()
        self._names: dict[str, str] = {}  # public key -> its mailbox's own name

    def add(self, mailbox: InProcessMailbox) -> None:
        """Make a mailbox reachable; called by the mailbox itself."""
        self._names[mailbox.public_key] = mailbox.name
        self._mailboxes[mailbox.address] = mailbox

    def remove(self, mailbox: InProcessMailbox) -> None:
        """Make a mailbox unreachable; called by the mailbox itself."""
        self._mailboxes.pop(mailbox.address, None)

    def find(self, address: str, public_key: str) -> InProcessMailbox | None:
        """Return the mailbox at an address, or None if it is closed or has another key."""
        mailbox = self._mailboxes.get(address)
        return mailbox if mailbox is not None and mailbox.public_key == public_key else None

    def name_of(self, public_key: str) -> str | None:
        """Return the name of the party with this key, or None if no mailbox has had it."""
        return self._names.get(public_key)


class InProcessMailbox(Mailbox):
    """A mailbox that other mailboxes of the same hub can reach, from any thread of this process.

    Nothing is encrypted: keys only identify senders. If it is open, every mailbox of the hub may connect, under its own
    name.
    """

    def __init__(
        self,
        hub: InProcessHub,
        name: str,
        keys: KeyPair | None = None,
        *,
        is_open: bool = True,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(name, (keys or generate_keypair()).public, Refusals(name))
        self._limits = Limits(max_frame_bytes=max_frame_bytes, max_message_bytes=max_message_bytes)
        self._is_open = is_open
        self._refused_peers: set[str] = set()
        # A signal handler or finalizer may call its put(), even in the middle of a get(). None means: check _is_woken.
        self._queue: queue.SimpleQueue[tuple[str, Sequence[bytes]] | None] = queue.SimpleQueue()
        self._is_woken = False
        self._hub = hub
        self.addresses = (f"{_SCHEME}{secrets.token_hex(16)}",)
        hub.add(self)

    def send(self, name: str, payload: bytes, tensors: Sequence[Tensor] = ()) -> int:  # noqa: D102
        self._check_peer(name)
        frames = [bytes(frame) for frame in encode_message(payload, tensors, self._limits, self._links.get(name))]
        if name in self._refused_peers:
            raise self._refusal_error(name)
        peer = self._hub.find(*self._peers[name])
        if peer is not None:
            peer.accept_frames(self.public_key, frames)
        return sum(map(len, frames))

    def receive(self, timeout_s: float | None) -> Delivery | None:  # noqa: D102
        self._check_open()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._is_woken:
                self._is_woken = False
                return None
            left_s = math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)
            wait_s = min(left_s, max(self._delayed.next_due_in_s, 0.0), threading.TIMEOUT_MAX)
            try:
                item = self._queue.get(timeout=wait_s)
            except queue.Empty:
                if (due := self._delayed.pop_due()) is not None or left_s <= wait_s:
                    return due
                continue
            delivery = None if item is None else self._decode(*item)
            if delivery is not None or left_s <= 0:  # refused messages may keep coming
                return delivery

    def listen(self, endpoint: TcpEndpoint) -> str:  # noqa: D102
        raise ArgumentError(f"mailbox {self.name!r} can't listen at {endpoint}: other processes can't reach it")

    def is_connected(self, name: str) -> bool:  # noqa: D102
        self._check_peer(name)
        return name not in self._refused_peers

    def explain_unconnected(self, name: str) -> str:  # noqa: D102
        return "" if self.is_connected(name) else "it refused the key"

    def wake(self) -> None:  # noqa: D102
        self._is_woken = True
        self._queue.put(None)

    def close(self) -> None:  # noqa: D102
        self._closed = True
        self._peers.clear()
        self._hub.remove(self)

    def admit_connection(self, sender_key: str) -> bool:
        """Return whether the holder of a key may connect; count and log a refusal."""
        if self._name_of(sender_key) is not None:
            return True
        self._refuse_key("a connection", sender_key)
        return False

    def accept_frames(self, sender_key: str, frames: Sequence[bytes]) -> None:
        """Queue frames as they are, unless the key is not authorised; tests call this to send malformed messages."""
        if self._name_of(sender_key) is None:
            self._refuse_key("a message", sender_key)
        elif not self._closed:
            self._queue.put((sender_key, frames))

    def _name_of(self, public_key: str) -> str | None:
        name = self._authorised.get(public_key)
        return self._hub.name_of(public_key) if name is None and self._is_open else name

    def _decode(self, sender_key: str, frames: Sequence[bytes]) -> Delivery | None:
        sender = self._name_of(sender_key)
        if sender is None:  # its authorisation was withdrawn while the message waited
            self._refuse_key("a message", sender_key)
            return None
        try:
            message = decode_message(frames, self._limits)
        except MalformedError as error:
            self._refusals.add(sender, error.kind, error.detail)
            return None
        num_bytes = sum(map(len, frames))
        return self._hold_until_due(Delivery(sender, message.payload, message.tensors, num_bytes), message.due_us)

    def _authorise(self, public_key: str) -> None:
        pass  # the sender of each message is looked up when it is received

    def _withdraw(self, public_key: str) -> None:
        pass

    def _connect(self, name: str, address: str, public_key: str) -> None:
        raw_key(public_key)
        if not address.startswith(_SCHEME):
            raise ArgumentError(
                f"mailbox {self.name!r} can't connect to {name!r} at {address!r}: pass the address of its mailbox"
            )
        peer = self._hub.find(address, public_key)
        if peer is not None and not peer.admit_connection(self.public_key):
            self._refused_peers.add(name)

    def _disconnect(self, name: str) -> None:
        self._refused_peers.discard(name)

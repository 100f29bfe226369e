"""The mailbox, through which every party sends and receives, whatever carries the messages.

Knows no sockets and no wire format; `zmq_mailbox` and `inprocess` implement it, under one contract.
"""

from __future__ import annotations

import abc
import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

from lingualinked.errors import ArgumentError, ClosedError, PeerUnknownError, ProtocolError
from lingualinked.transport.hosts.shaping import DelayQueue, ShapedLink
from lingualinked.transport.keys.keys import authorise
from lingualinked.transport.wire.delivery import Delivery

if TYPE_CHECKING:
    from torch import Tensor

    from lingualinked.transport.sockets.tcp_listener import TcpEndpoint
    from lingualinked.transport.wire.refusals import Refusals

_MAX_DELAY_S = 60.0
_MAX_DELAYED_BYTES = 1 << 30  # of one sender


class Mailbox(abc.ABC):
    """One party's inbox, with addresses that others send to, and the peers that the party sends to.

    A mailbox belongs to the thread that made it: only that thread may call `authorise`, `withdraw`, `connect`, `disconnect`,
    `send`, `receive` and `close`. Any thread, signal handler or finalizer may call `wake`. Once the owning thread has ended,
    another thread or a finalizer may call `close`. A mailbox that is garbage-collected closes itself. In a forked child only
    `close` may be called, and it has no effect on the parent.

    Messages from one sender arrive in the order in which they were sent, and no sender can starve another. Messages
    that have not left when either side closes or disconnects are dropped silently. Only the application bounds how
    much is in flight.
    """

    name: str  # for error messages; other parties choose what they call it
    public_key: str  # what others pass to `connect`, with the address
    addresses: tuple[
        str, ...
    ]  # where others connect to, the fastest one first; the host of a TCP address may be a wildcard
    _refusals: Refusals
    _authorised: dict[str, str]  # public key -> name
    _peers: dict[str, tuple[str, str]]  # name -> address, public key
    _elsewhere: set[str]  # public keys of parties on other hosts

    def __init__(self, name: str, public_key: str, refusals: Refusals) -> None:
        self.name = name
        self.public_key = public_key
        self._refusals = refusals
        self._authorised = {}
        self._peers = {}
        self._elsewhere = set()
        self._links: dict[str, ShapedLink] = {}
        self._delayed = DelayQueue()
        self._delayed_from: frozenset[str] = frozenset()
        self._closed = False
        self.encode_s = 0.0  # of the last `send`

    @property
    def address(self) -> str:
        """The address for parties of this host; never reused after the mailbox is closed."""
        return self.addresses[0]

    @property
    def num_refused(self) -> int:
        """Number of messages and connections that were refused so far.

        A connection that shows no authorised key is counted once, at the latest some seconds after its end.
        """
        return self._refusals.num

    def refuse(self, sender: str, kind: str, detail: str, level: int = logging.WARNING) -> None:
        """Count a delivered message as unusable, and log it if it is the first of its kind from its sender.

        The kind is one of a fixed set of words.
        """
        self._refusals.add(sender, kind, detail, level)

    def authorise(self, name: str, public_key: str, *, same_host: bool = True) -> None:
        """Let the holder of a key connect from now on. Does nothing if the key is authorised under this name already.

        With a party that is not on the same host, no memory is shared, in either direction. A key that had the name before
        loses it, and its messages are dropped. A connection that has been refused stays refused: its maker has to
        `disconnect` and `connect` again. Raises ArgumentError if the key is authorised under another name.
        """
        self._check_open()
        before = authorise(self._authorised, name, public_key)
        if not same_host:
            self._elsewhere.add(public_key)
        self._authorise(public_key)
        if before is not None:
            self._elsewhere.discard(before)
            self._withdraw(before)

    def withdraw(self, name: str) -> None:
        """Receive nothing more from a party. Does nothing if no party is authorised under this name."""
        self._check_open()
        for key in [key for key, owner in self._authorised.items() if owner == name]:
            del self._authorised[key]
            self._elsewhere.discard(key)
            self._withdraw(key)

    def connect(self, name: str, address: str, public_key: str) -> None:
        """Connect to a peer, so that messages can be sent to it. Does nothing if it is connected already.

        Returns at once; messages that are sent before the connection is established wait for it. The peer must have
        authorised this mailbox's key *before*: a refusal is final. Raises ArgumentError if the name is connected to
        another address or key, or if address or key is not valid.
        """
        self._check_open()
        known = self._peers.get(name)
        if known == (address, public_key):
            return
        if known is not None:
            raise ArgumentError(
                f"mailbox {self.name!r} is connected to {name!r} at {known[0]} already, and {address} is another address "
                f"or has another key: call disconnect({name!r}) first"
            )
        self._connect(name, address, public_key)
        self._peers[name] = (address, public_key)

    @abc.abstractmethod
    def listen(self, endpoint: TcpEndpoint) -> str:
        """Listen at one more endpoint from now on; return the address at which others reach it.

        Raises ArgumentError and ResourceError as `TcpListener` does.
        """

    @abc.abstractmethod
    def is_connected(self, name: str) -> bool:
        """Return whether the connection to a peer has come about since `connect`; those within a host always have.

        If it has not, `receive` returns None, as from a `wake`, once it has.
        """

    @abc.abstractmethod
    def explain_unconnected(self, name: str) -> str:
        """Say in a few words why the connection to a peer has not come about; within half a second."""

    def disconnect(self, name: str) -> None:
        """Disconnect from a peer, if connected, and drop the messages that wait to be sent to it."""
        self._check_open()
        if self._peers.pop(name, None) is not None:
            self._disconnect(name)

    def shape_link(self, name: str, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        """Emulate a slower link to a peer, from the next message on. The peer need not be connected yet.

        The peer must be on the same machine, whose clock determines when messages are due. The link transmits one
        message at a time; its latency counts from the end of a transmission to the arrival.
        """
        link = self._links.get(name)
        if link is not None:
            link.update(bandwidth_bytes_per_s, latency_s)
        elif bandwidth_bytes_per_s != math.inf or latency_s:
            self._links[name] = ShapedLink(bandwidth_bytes_per_s, latency_s)

    def expect_delays(self, names: Iterable[str]) -> None:
        """Hold messages from these senders too until they would have arrived on the link that they emulate."""
        self._delayed_from |= frozenset(names)

    @abc.abstractmethod
    def send(self, name: str, payload: bytes, tensors: Sequence[Tensor] = ()) -> int:
        """Send a message to a peer without blocking; return its bytes, before encryption, however they travel.

        The caller may change the tensors as soon as the call returns. Raises PeerUnknownError if no peer of that name
        is connected, and ProtocolError if the message is too large or holds something that can't be sent (nothing is
        sent then), or if the peer refused the connection because it had not authorised this mailbox's key.
        """

    @abc.abstractmethod
    def receive(self, timeout_s: float | None) -> Delivery | None:
        """Wait for the next message, and return it; return None after the time-out, if any, or after a `wake`.

        Malformed messages are dropped, counted and logged. A signal handler's exception (``KeyboardInterrupt``)
        propagates; the message that was being received at that moment may be lost, but none after it.
        """

    @abc.abstractmethod
    def wake(self) -> None:
        """Make the `receive` in progress, or else the next one, return None before any message.

        Several calls before that `receive` returns count as one. Does nothing once the mailbox is closed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give up the address and drop all waiting messages, within bounded time. Does nothing the second time."""

    @abc.abstractmethod
    def _authorise(self, public_key: str) -> None:
        """Accept connections from the holder of a key."""

    @abc.abstractmethod
    def _withdraw(self, public_key: str) -> None:
        """Accept no more connections from the holder of a key."""

    @abc.abstractmethod
    def _connect(self, name: str, address: str, public_key: str) -> None:
        """Open the connection to a peer that is not connected."""

    @abc.abstractmethod
    def _disconnect(self, name: str) -> None:
        """Close the connection to a peer."""

    def _hold_until_due(self, delivery: Delivery, due_us: int) -> Delivery | None:
        """Return a message that is due; hold any other one, within limits on its sender's bytes and delay."""
        if not due_us:
            return delivery
        if delivery.sender not in self._delayed_from:
            self.refuse(
                delivery.sender,
                "due time",
                "a message on a link that is not emulated has a due time: it is delivered at once",
            )
            return delivery
        latest_us = int((time.monotonic() + _MAX_DELAY_S) * 1e6)
        if due_us > latest_us:
            self.refuse(
                delivery.sender,
                "due time",
                f"a message is due in more than {_MAX_DELAY_S:g} s: it is delivered after {_MAX_DELAY_S:g} s",
            )
        delivery.due_s = min(due_us, latest_us) / 1e6
        if self._delayed.num_bytes(delivery.sender) + delivery.num_bytes > _MAX_DELAYED_BYTES:
            self.refuse(
                delivery.sender,
                "due time",
                f"more than {_MAX_DELAYED_BYTES >> 20} MiB are not due yet: the message is dropped",
            )
        else:
            self._delayed.add(min(due_us, latest_us), delivery)
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"mailbox {self.name!r} is closed: make a new one, with a new address and new keys")

    def _check_peer(self, name: str) -> None:
        self._check_open()
        if name not in self._peers:
            known = ", ".join(map(repr, self._peers)) or "none"
            raise PeerUnknownError(
                f"mailbox {self.name!r} is not connected to {name!r} (connected peers: {known}): call connect() first"
            )

    def _refuse_key(self, what: str, key: str) -> None:
        self._refusals.add("unknown peers", "key", f"{what} with the key {key!r}, which is not authorised")

    def _refusal_error(self, name: str) -> ProtocolError:
        return ProtocolError(
            f"{name!r} refused the connection of mailbox {self.name!r}, whose key it has not authorised, or has stopped "
            f"receiving: authorise the key at {name!r} before this mailbox connects, and keep calling receive() there"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"at {', '.join(self.addresses)}"
        return f"<{type(self).__name__} {self.name!r} {state}>"

"""The mailbox: what every party sends from and receives into, whatever carries the messages.

Knows no sockets and no wire format; `zmq_mailbox` and `inprocess` are the two that exist, under one contract.
"""

from __future__ import annotations

import abc
import logging
import math
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lingualinked.errors import ArgumentError, ClosedError, PeerUnknownError, ProtocolError
from lingualinked.transport.delivery import Delivery
from lingualinked.transport.shaping import Held, ShapedLink

if TYPE_CHECKING:
    from torch import Tensor

    from lingualinked.transport.refusals import Refusals

_LONGEST_DELAY_S = 60.0
_MOST_HELD_BYTES = 1 << 30  # of one sender


class Mailbox(abc.ABC):
    """One party's address: an inbox that others send to, and the peers that it sends to itself.

    A mailbox belongs to the thread that made it: that thread alone calls `authorise`, `connect`, `disconnect`, `send`,
    `receive` and `close`. `wake` may be called from any thread, a signal handler or a finalizer. Once the owning thread has
    ended, another one (a finalizer too) may call `close`. A mailbox that is dropped unclosed closes itself. In a
    forked child only `close` may be called, and harms nobody.

    Messages of one sender arrive in the order in which they were sent, and no sender can starve another. What
    is not yet on its way when either side closes or disconnects is dropped, without a word. How much is in flight
    is bounded by the application alone.

    Attributes
    ----------
    name : str
        The party's own name, for messages; what others call it is theirs to say.
    public_key : str
        What others pass to `connect`, beside the address.
    address : str
        Where others connect to. Never used again once the mailbox is closed.
    encode_s : float
        Seconds that the last `send` took.
    """

    name: str
    public_key: str
    address: str
    _refusals: Refusals
    _authorised: dict[str, str]  # public key -> name
    _peers: dict[str, tuple[str, str]]  # name -> address, public key

    def __init__(self, name: str, public_key: str, refusals: Refusals) -> None:
        self.name = name
        self.public_key = public_key
        self._refusals = refusals
        self._peers = {}
        self._links: dict[str, ShapedLink] = {}
        self._held = Held()
        self._delayed_from: frozenset[str] = frozenset()
        self._closed = False
        self.encode_s = 0.0

    @property
    def num_refused(self) -> int:
        """Number of messages, and of connections that showed no authorised key, that were refused so far.

        A connection is counted once, however it failed, at the latest some seconds after its end.
        """
        return self._refusals.num

    def refuse(self, sender: str, kind: str, detail: str, level: int = logging.WARNING) -> None:
        """Count a message that was delivered and can't be used, and log it if it is the first of its kind from its sender.

        Parameters
        ----------
        sender : str
            Who sent it.
        kind : str
            One of a fixed set of words.
        detail : str
            What was wrong, with the values.
        level : int
            Of the log record.
        """
        self._refusals.add(sender, kind, detail, level)

    def authorise(self, name: str, public_key: str) -> None:
        """Let the holder of a key connect from now on. Does nothing if it may already, under this name.

        Who had the name before loses it: what comes with that key is dropped. A connection that has been refused stays so;
        its maker has to `disconnect` and `connect` again.

        Parameters
        ----------
        name : str
            The sender of what comes with the key.
        public_key : str
            The key; nobody else's.

        Raises
        ------
        ArgumentError
            If the key is none, or authorised under another name.
        ClosedError
            If the mailbox is closed.
        """
        self._check_open()
        self._authorise(name, public_key)

    def withdraw(self, name: str) -> None:
        """Take nothing more from a party that was authorised; does nothing if none is, under this name.

        Raises
        ------
        ClosedError
            If the mailbox is closed.
        """
        self._check_open()
        for key in [key for key, owner in self._authorised.items() if owner == name]:
            del self._authorised[key]
            self._withdraw(key)

    def connect(self, name: str, address: str, public_key: str) -> None:
        """Make a peer known, so that messages can be sent to it. Does nothing if it is known as the same.

        Returns at once; messages that are sent before the connection stands wait for it. The peer must have
        authorised this mailbox's key *before*: a refusal is final.

        Parameters
        ----------
        name : str
            What to call the peer in `send`.
        address : str
            Its mailbox's `address`.
        public_key : str
            Its public key; only the holder of the secret half can read what is sent.

        Raises
        ------
        ArgumentError
            If the name is connected to another address or key, or address or key are none.
        ClosedError
            If the mailbox is closed.
        """
        self._check_open()
        known = self._peers.get(name)
        if known == (address, public_key):
            return
        if known is not None:
            raise ArgumentError(
                f"mailbox {self.name!r} is connected to {name!r} at {known[0]} already, "
                f"and {address} is another address or comes with another key: disconnect({name!r}) first"
            )
        self._connect(name, address, public_key)
        self._peers[name] = (address, public_key)

    def disconnect(self, name: str) -> None:
        """Forget a peer, and drop what still waits to be sent to it. Does nothing if it is not known.

        Raises
        ------
        ClosedError
            If the mailbox is closed.
        """
        self._check_open()
        if self._peers.pop(name, None) is not None:
            self._disconnect(name)

    def shape(self, name: str, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        """Emulate a slower link to a peer, from the next message on; whether it is connected yet does not matter.

        Parameters
        ----------
        name : str
            The peer, as it is called in `send`; on the same machine, since what is due is told by its clock.
        bandwidth_bytes_per_s : float
            Rate at which the link takes messages, one at a time; may be infinite.
        latency_s : float
            Seconds that each is on its way, then.
        """
        link = self._links.get(name)
        if link is not None:
            link.change(bandwidth_bytes_per_s, latency_s)
        elif bandwidth_bytes_per_s != math.inf or latency_s:
            self._links[name] = ShapedLink(bandwidth_bytes_per_s, latency_s)

    def expect_delays(self, names: Iterable[str]) -> None:
        """Hold back messages of these senders, too, until they would have arrived on the link that they emulate.

        Parameters
        ----------
        names : iterable of str
            The senders, as they are authorised.
        """
        self._delayed_from |= frozenset(names)

    @abc.abstractmethod
    def send(self, name: str, payload: bytes, tensors: Sequence[Tensor] = ()) -> int:
        """Send a message to a peer; never block.

        The tensors may be changed as soon as the call returns.

        Parameters
        ----------
        name : str
            The peer, as it was connected.
        payload : bytes
            Anything, of at most about `max_frame_bytes`.
        tensors : sequence of torch.Tensor
            Dense tensors of any shape, strides and device; of the dtypes that `codec` lists.

        Returns
        -------
        int
            Bytes of all frames before encryption.

        Raises
        ------
        PeerUnknownError
            If no peer of that name is connected.
        ProtocolError
            If the message is too large or holds what can't be sent (nothing has been sent then), or if the peer refused
            the connection because it did not authorise this mailbox's key.
        ClosedError
            If the mailbox is closed.
        """

    @abc.abstractmethod
    def receive(self, timeout_s: float | None) -> Delivery | None:
        """Wait for the next message, and take it. Malformed ones are dropped, counted and logged on the way.

        A signal handler's exception (``KeyboardInterrupt``) passes through; a message that was being taken at that
        moment may be lost, the ones behind it are not harmed.

        Parameters
        ----------
        timeout_s : float or None
            How long to wait at most, in seconds; 0 takes only what is there, None waits until a message or a `wake`.

        Returns
        -------
        Delivery or None
            The message; None after the time-out or a `wake`.

        Raises
        ------
        ClosedError
            If the mailbox is closed.
        """

    @abc.abstractmethod
    def wake(self) -> None:
        """Make the `receive` under way, or else the next one, return None before any message.

        Several calls before that one None count as one. Does nothing once the mailbox is closed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give up the address and drop what still waits, within bounded time. Does nothing the second time."""

    @abc.abstractmethod
    def _authorise(self, name: str, public_key: str) -> None:
        """Let the holder of a key in."""

    @abc.abstractmethod
    def _withdraw(self, public_key: str) -> None:
        """Let the holder of a key in no more."""

    @abc.abstractmethod
    def _connect(self, name: str, address: str, public_key: str) -> None:
        """Open the way to a peer that is not connected."""

    @abc.abstractmethod
    def _disconnect(self, name: str) -> None:
        """Close the way to a peer that was connected."""

    def _arrive(self, delivery: Delivery, due_us: int) -> Delivery | None:
        """Return a message that is due, and hold one that is not yet; nobody has more held, or longer, than is allowed."""
        if not due_us:
            return delivery
        if delivery.sender not in self._delayed_from:
            self.refuse(
                delivery.sender, "due time", "a message on a link that is not emulated: it is delivered at once"
            )
            return delivery
        latest_us = int((time.monotonic() + _LONGEST_DELAY_S) * 1e6)
        if due_us > latest_us:
            self.refuse(
                delivery.sender, "due time", f"a message due in more than {_LONGEST_DELAY_S:g} s: it is due then"
            )
        delivery.due_s = min(due_us, latest_us) / 1e6
        if self._held.num_bytes(delivery.sender) + delivery.num_bytes > _MOST_HELD_BYTES:
            self.refuse(
                delivery.sender, "due time", f"more than {_MOST_HELD_BYTES >> 20} MiB that are not due: dropped"
            )
        else:
            self._held.add(min(due_us, latest_us), delivery)
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"mailbox {self.name!r} is closed: make a new one, with a new address and new keys")

    def _check_peer(self, name: str) -> None:
        self._check_open()
        if name not in self._peers:
            known = ", ".join(map(repr, self._peers)) or "none"
            raise PeerUnknownError(
                f"mailbox {self.name!r} is not connected to {name!r} (connected peers: {known}): connect() it first"
            )

    def _refuse_key(self, where: str, key: str) -> None:
        self._refusals.add("unknown peers", "key", f"{where} with the key {key!r}, which is not authorised")

    def _refused_by(self, name: str) -> ProtocolError:
        return ProtocolError(
            f"{name!r} refused the connection of mailbox {self.name!r}, whose key it has not authorised, or takes nothing: "
            "a peer has to know a key before its holder connects, and to receive"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"at {self.address}"
        return f"<{type(self).__name__} {self.name!r} {state}>"

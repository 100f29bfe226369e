"""The other workers that the caller has introduced, and the connections to them.

Knows one mailbox, names, keys and addresses; not what the messages mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import PeerUnknownError, ProtocolError, UnreachableError
from lingualinked.protocol.messages import (
    ConnectPeer,
    DismissWorker,
    IntroduceWorker,
    Listening,
    ListenOverNetwork,
    PeerConnected,
    PeerMessage,
    encode,
)
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.sockets.awaited_connections import AwaitedConnections


class Peers:
    """The parties, besides the caller, that one worker may exchange messages with."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.connections = AwaitedConnections(mailbox)
        self._known = {mailbox.name: (mailbox.address, mailbox.public_key)}  # by name
        mailbox.authorise(mailbox.name, mailbox.public_key)  # a worker may host the next stage itself

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def introduce(self, peer: IntroduceWorker) -> None:
        """Accept messages from one more worker, but do not connect to it: it may not have been introduced to us yet.

        Raises ProtocolError if the name is known with another address or key, ArgumentError if the key is not valid or
        belongs to another party.
        """
        introduced = peer.address, peer.public_key
        if self._known.get(peer.name, introduced) != introduced:
            raise ProtocolError(f"{peer.name!r} is known with another address or key")
        self._mailbox.authorise(peer.name, peer.public_key, same_host=peer.same_host)
        self._known[peer.name] = introduced

    def await_caller(self, address: str) -> None:
        """Make `connections.decide` raise UnreachableError if no connection to the caller comes about."""

        def decided(why_not: str) -> None:
            if why_not:
                raise UnreachableError(self._mailbox.name, CALLER, address, why_not)

        self.connections.add(CALLER, decided)

    def prepare_network(
        self, message: ConnectPeer | ListenOverNetwork, send: Callable[[PeerConnected], None]
    ) -> Listening | None:
        """Listen at one more endpoint, and return the answer; or connect to a worker that knows this one, and send it later.

        Raises PeerUnknownError if the worker has not been introduced.
        """
        if isinstance(message, ListenOverNetwork):
            return Listening(request=message.request, address=self._mailbox.listen(message.endpoint))
        if message.name not in self._known:
            raise PeerUnknownError(f"{message.name!r} has not been introduced to {self._mailbox.name!r}")
        self._mailbox.connect(message.name, *self._known[message.name])
        self.connections.add(
            message.name, lambda why_not: send(PeerConnected(request=message.request, why_not=why_not))
        )
        return None

    def dismiss(self, peer: DismissWorker) -> None:
        """Remove a worker and close the connection to it; does nothing if it is not known."""
        if self._known.pop(peer.name, None) is not None:
            self.connections.forget(peer.name)
            self._mailbox.withdraw(peer.name)
            self._mailbox.disconnect(peer.name)

    def send(self, name: str, message: PeerMessage, tensors: Sequence[Tensor] = ()) -> int:
        """Send a message to a worker, connecting to it the first time; return the bytes sent.

        Raises PeerUnknownError if the worker has not been introduced.
        """
        if name in self._known:
            self._mailbox.connect(name, *self._known[name])
        return self._mailbox.send(name, encode(message), tensors)

"""The other workers, as the caller has introduced them: whose messages are taken, and where theirs are sent.

Knows one mailbox, names, keys and addresses; not what is said.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.messages import DismissWorker, IntroduceWorker, PeerMessage, encode
from lingualinked.transport.mailbox import Mailbox


class Peers:
    """Whom one worker may talk to besides the caller.

    Parameters
    ----------
    mailbox : Mailbox
        The worker's.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._known = {mailbox.name: (mailbox.address, mailbox.public_key)}  # by name
        mailbox.authorise(mailbox.name, mailbox.public_key)  # a worker may be the next stage of its own

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def introduce(self, peer: IntroduceWorker) -> None:
        """Take messages from one more worker. Its own inbox takes ours later: nothing connects to it yet.

        Raises
        ------
        ProtocolError
            If the name is known with another address or key.
        ArgumentError
            If the key is none, or another party's.
        """
        introduced = peer.address, peer.public_key
        if self._known.get(peer.name, introduced) != introduced:
            raise ProtocolError(f"{peer.name!r} is known with another address or key")
        self._mailbox.authorise(peer.name, peer.public_key)
        self._known[peer.name] = introduced

    def dismiss(self, peer: DismissWorker) -> None:
        """Forget a worker; does nothing if it is not known."""
        if self._known.pop(peer.name, None) is not None:
            self._mailbox.withdraw(peer.name)
            self._mailbox.disconnect(peer.name)

    def send(self, name: str, message: PeerMessage, tensors: Sequence[Tensor] = ()) -> int:
        """Send to a worker, and return the bytes sent; the first time makes the connection.

        Raises
        ------
        PeerUnknownError
            If it has not been introduced.
        """
        if name in self._known:
            self._mailbox.connect(name, *self._known[name])
        return self._mailbox.send(name, encode(message), tensors)

"""What a worker is told, in the order in which it is to do it.

Knows messages and one mailbox; not what is done with them.
"""

from __future__ import annotations

import logging
from collections import deque

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.protocol.messages import CallerMessage, LoadStage, PeerMessage, decode
from lingualinked.protocol.moving import MovingMessage
from lingualinked.transport.mailbox import Delivery, Mailbox

logger = logging.getLogger("lingualinked.worker")


class Inbox:
    """A worker's messages; what moves a model comes first, else they keep their order.

    Parameters
    ----------
    mailbox : Mailbox
        Where they come in.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._waiting: deque[tuple[CallerMessage | PeerMessage, Delivery]] = deque()
        self._num_refused = 0

    @property
    def num_refused(self) -> int:
        """Messages and connections that were refused so far."""
        return self._num_refused + self._mailbox.num_refused

    def next(self) -> tuple[CallerMessage | PeerMessage, Delivery] | None:
        """Wait until there is a message, or the mailbox is woken; give the message, ``None`` if there is none."""
        delivery = self._mailbox.receive(0 if self._waiting else None)
        while delivery is not None:
            try:
                self._waiting.append((_read(delivery), delivery))
            except ProtocolError as error:
                self.refuse(delivery, error)
            delivery = self._mailbox.receive(0)
        # A session that moves would wait for the steps of all others here.
        for index, (message, _) in enumerate(self._waiting):
            if isinstance(message, LoadStage | MovingMessage):
                found = self._waiting[index]
                del self._waiting[index]
                return found
        return self._waiting.popleft() if self._waiting else None

    def refuse(self, delivery: Delivery, error: ProtocolError) -> None:
        """Say that a message is not served, and why."""
        self._num_refused += 1
        logger.warning("refused a message from %r: %s", delivery.sender, error)


def _read(delivery: Delivery) -> CallerMessage | PeerMessage:
    message = decode(delivery.payload)
    if not isinstance(message, CallerMessage | PeerMessage):
        raise ProtocolError(f"{type(message).__name__} is not for a worker")
    if delivery.sender != CALLER and not isinstance(message, PeerMessage):
        raise ProtocolError(f"{type(message).__name__} is for the caller to say")
    return message

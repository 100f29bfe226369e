"""What a worker is told, in the order in which it is to do it.

Knows messages and one mailbox; not what is done with them.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable

from lingualinked.errors import ProtocolError
from lingualinked.protocol.base import Message
from lingualinked.protocol.messages import CallerMessage, LoadStage, PeerMessage, decode
from lingualinked.protocol.moving import MovingMessage
from lingualinked.transport.delivery import Delivery
from lingualinked.transport.mailbox import Mailbox
from lingualinked.worker.roles import StaleMessageError

# Of one sender's; more stay in the mailbox, which stops reading from it in turn.
_MAX_WAITING = 1000
_MAX_WAITING_BYTES = 64 << 20

Waiting = tuple[CallerMessage | PeerMessage, Delivery]


class Inbox:
    """A worker's messages; what moves a model comes first, else those of each sender keep their order.

    Parameters
    ----------
    mailbox : Mailbox
        Where they come in.
    check : callable
        Raises a `ProtocolError` if a message is not its sender's to send.
    """

    def __init__(self, mailbox: Mailbox, check: Callable[[Message, str], None]) -> None:
        self._mailbox = mailbox
        self._check = check
        self._moves, self._others = _Turns(), _Turns()
        self._load: dict[str, tuple[int, int]] = {}  # messages that wait, and their bytes, by sender

    def next(self) -> Waiting | None:
        """Wait until there is a message, or the mailbox is woken; give the message, ``None`` if there is none."""
        delivery = self._mailbox.receive(0 if self._moves or self._others else None)
        while delivery is not None and self._accept(delivery):
            delivery = self._mailbox.receive(0)
        # A session that moves would wait for the steps of all others here.
        waiting = (self._moves or self._others).pop()
        if waiting is not None:
            self._count(waiting[1], -1)
        return waiting

    def refuse(self, delivery: Delivery, error: Exception, kind: str) -> None:
        """Say that a message is not served, and why."""
        is_expected = isinstance(error, ProtocolError)
        detail = str(error) if is_expected else "".join(traceback.format_exception(error))
        level = logging.DEBUG if isinstance(error, StaleMessageError) else logging.WARNING
        self._mailbox.refuse(delivery.sender, kind, detail, level)

    def _accept(self, delivery: Delivery) -> bool:
        """Add a message to those that wait; return whether to read on at once."""
        kind = "no message"
        try:
            message = decode(delivery.payload)
            kind = type(message).__name__
            self._check(message, delivery.sender)
        except ProtocolError as error:
            self.refuse(delivery, error, kind)
            return False  # else a flood of such would hold up what waits
        assert isinstance(message, CallerMessage | PeerMessage)
        (self._moves if isinstance(message, LoadStage | MovingMessage) else self._others).add((message, delivery))
        return self._count(delivery, 1)

    def _count(self, delivery: Delivery, sign: int) -> bool:
        num, num_bytes = self._load.get(delivery.sender, (0, 0))
        num, num_bytes = num + sign, num_bytes + sign * delivery.num_bytes
        self._load[delivery.sender] = num, num_bytes
        return num < _MAX_WAITING and num_bytes < _MAX_WAITING_BYTES


class _Turns:
    """Messages of several senders, who take turns: none of them can hold up another's."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Waiting]] = {}  # whose turn is next stands first

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, waiting: Waiting) -> None:
        """Add one to those that wait."""
        self._waiting.setdefault(waiting[1].sender, deque()).append(waiting)

    def pop(self) -> Waiting | None:
        """Take the next one, if any waits."""
        if not self._waiting:
            return None
        sender = next(iter(self._waiting))
        queue = self._waiting.pop(sender)
        waiting = queue.popleft()
        if queue:
            self._waiting[sender] = queue
        return waiting

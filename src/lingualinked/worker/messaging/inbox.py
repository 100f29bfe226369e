"""A worker's received messages, in the order in which it handles them.

Knows messages and one mailbox; not how messages are handled.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from typing import cast, get_args

from lingualinked.errors import ProtocolError
from lingualinked.protocol.base import Message
from lingualinked.protocol.messages import CallerMessage, CutLinks, EmulateDevice, LoadStage, PeerMessage, decode
from lingualinked.protocol.moving import MovingMessage
from lingualinked.protocol.steps import StepGroup
from lingualinked.protocol.weights import WeightMessage
from lingualinked.transport.hosts import cut_links
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.worker.messaging.joined_steps import split_group
from lingualinked.worker.messaging.sender_check import StaleMessageError

# Of one sender; further messages stay in the mailbox, which then stops reading from that sender.
_MAX_WAITING = 1000
_MAX_WAITING_BYTES = 64 << 20
# As sets of types: to compare each message with unions of this many types takes as long as to send it.
_PASS_CUTS = frozenset({CutLinks, EmulateDevice})
_FIRST = frozenset({LoadStage, *get_args(MovingMessage), *get_args(WeightMessage)})

Waiting = tuple[CallerMessage | PeerMessage, Delivery]


class Inbox:
    """A worker's messages: those that move a model come first, and otherwise senders take turns, each in order.

    `check_sender` raises a `ProtocolError` if a party may not send a message.
    """

    def __init__(self, mailbox: Mailbox, check_sender: Callable[[Message, str], None]) -> None:
        self._mailbox = mailbox
        self._check_sender = check_sender
        self._moves, self._others = _FairQueue(), _FairQueue()
        self._cut_links = cut_links.CutLinks(mailbox)
        self._load: dict[str, tuple[int, int]] = {}  # waiting messages and their bytes, by sender

    def next_message(self, timeout_s: float | None = None) -> Waiting | None:
        """Wait for a message, a wake-up of the mailbox or the time-out; return the message, or None."""
        delivery = self._mailbox.receive(0 if self._moves or self._others else timeout_s)
        while delivery is not None and self._accept(delivery):
            delivery = self._mailbox.receive(0)
        # Otherwise a session that moves would wait for the steps of all others.
        waiting = (self._moves or self._others).pop()
        if waiting is not None:
            self._count(waiting[1], -1)
        return waiting

    def take_others(self, accepts: Callable[[Message, Delivery], bool], most: int) -> list[Waiting]:
        """Return at most so many messages that wait and are accepted, each sender's up to the first one that is not."""
        taken = self._others.take_heads(accepts, most) if not self._moves else []
        for _, delivery in taken:
            self._count(delivery, -1)
        return taken

    def cut_links(self, senders: Iterable[str]) -> None:
        """Handle nothing from these senders, and what has come from all others while their links were cut."""
        for delivery in self._cut_links.cut(senders):
            self._accept(delivery)

    def refuse(self, delivery: Delivery, error: Exception, kind: str) -> None:
        """Count and log a message that is not handled, and why."""
        is_expected = isinstance(error, ProtocolError)
        detail = str(error) if is_expected else "".join(traceback.format_exception(error))
        level = logging.DEBUG if isinstance(error, StaleMessageError) else logging.WARNING
        self._mailbox.refuse(delivery.sender, kind, detail, level)

    def _accept(self, delivery: Delivery) -> bool:
        """Queue a message; return whether to read the next one at once."""
        kind = "no message"
        try:
            message = decode(delivery.payload)
            kind = type(message).__name__
            if type(message) not in _PASS_CUTS and self._cut_links.hold(delivery):
                return True
            self._check_sender(message, delivery.sender)  # which also refuses what is not a message to a worker
            if isinstance(message, StepGroup):
                return self._accept_group(message, delivery)
        except ProtocolError as error:
            self.refuse(delivery, error, kind)
            return False  # otherwise a flood of them would hold up waiting messages
        queue = self._moves if type(message) in _FIRST else self._others
        queue.add((cast("CallerMessage | PeerMessage", message), delivery))
        return self._count(delivery, 1)

    def _accept_group(self, group: StepGroup, delivery: Delivery) -> bool:
        """Queue the steps of a group that its sender may send; return whether to read the next message at once."""
        reads_on = True
        for step, own in split_group(group, delivery):
            try:
                self._check_sender(step, own.sender)
            except ProtocolError as error:
                self.refuse(own, error, type(step).__name__)
                reads_on = False
            else:
                self._others.add((step, own))
                reads_on &= self._count(own, 1)
        return reads_on

    def _count(self, delivery: Delivery, sign: int) -> bool:
        num, num_bytes = self._load.get(delivery.sender, (0, 0))
        num, num_bytes = num + sign, num_bytes + sign * delivery.num_bytes
        self._load[delivery.sender] = num, num_bytes
        return num < _MAX_WAITING and num_bytes < _MAX_WAITING_BYTES


class _FairQueue:
    """Messages of several senders that take turns, so that none can hold up another."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Waiting]] = {}  # by sender; the first one is next

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, waiting: Waiting) -> None:
        """Add a message."""
        self._waiting.setdefault(waiting[1].sender, deque()).append(waiting)

    def pop(self) -> Waiting | None:
        """Remove the next message and return it, or None if the queue is empty."""
        if not self._waiting:
            return None
        sender = next(iter(self._waiting))
        queue = self._waiting.pop(sender)
        waiting = queue.popleft()
        if queue:
            self._waiting[sender] = queue
        return waiting

    def take_heads(self, accepts: Callable[[Message, Delivery], bool], most: int) -> list[Waiting]:
        """Remove at most so many messages that are accepted, from the heads of all queues, and return them."""
        taken: list[Waiting] = []
        for sender, queue in list(self._waiting.items()):
            while queue and len(taken) < most and accepts(*queue[0]):
                taken.append(queue.popleft())
            if not queue:
                del self._waiting[sender]
        return taken

"""Messages that were received over links that are cut, until those are restored.

Knows deliveries and their senders; neither what the messages mean nor who cuts links.
"""

from __future__ import annotations

from collections.abc import Iterable

from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.wire.delivery import Delivery

MAX_HELD_BYTES = 1 << 30


class CutLinks:
    """The links to one party that are cut, by their senders, and what has come over them since."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._held: dict[str, list[Delivery]] = {}

    def cut(self, senders: Iterable[str]) -> list[Delivery]:
        """Cut the links from these senders, and restore all others; return what has come over the latter meanwhile."""
        senders = frozenset(senders)
        restored = [each for each in self._held if each not in senders]
        released = [delivery for sender in restored for delivery in self._held.pop(sender)]
        for sender in senders:
            self._held.setdefault(sender, [])
        return released

    def hold(self, delivery: Delivery) -> bool:
        """Keep a message if its link is cut; return whether it is. What exceeds 1 GiB per link is lost."""
        held = self._held.get(delivery.sender)
        if held is None:
            return False
        if sum(each.num_bytes for each in held) + delivery.num_bytes > MAX_HELD_BYTES:
            detail = f"more than {MAX_HELD_BYTES >> 20} MiB have come over a link that is cut: the message is dropped"
            self._mailbox.refuse(delivery.sender, "cut link", detail)
        else:
            held.append(delivery)
        return True

"""Counts the input that a mailbox refused, and logs it once for each sender and kind.

Knows no sockets and no wire format.
"""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("lingualinked.transport")


class Refusals:
    """Counter of refused input; for use from any thread. `owner` is the name of the mailbox, for the log."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self._seen: set[tuple[str, str, int]] = set()
        self.num = 0

    def add(self, sender: str, kind: str, detail: str, level: int = logging.WARNING) -> None:
        """Count a refusal, and log it if it is the first of its kind from this sender.

        Senders and kinds must come from fixed sets, so that they can't fill the memory: pass one word for all unknown senders.
        """
        with self._lock:
            self.num += 1
            first = (sender, kind, level) not in self._seen
            self._seen.add((sender, kind, level))
        if first:
            logger.log(
                level,
                "mailbox %r refused input from %s (%s): %s; more of this kind from there is counted, not logged",
                self._owner,
                sender,
                kind,
                detail,
            )

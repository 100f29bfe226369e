"""The shared memory of one mailbox: a ring to each peer that it sends to, and the rings that senders have offered.

Knows who has which ring; no sockets, and not what is in a ring.
"""

from __future__ import annotations

import logging
import os

from lingualinked.errors import ProtocolError
from lingualinked.transport.memory.shared_ring import RingOffer, RingReader, RingWriter

logger = logging.getLogger("lingualinked.transport")

# Of one sender: after it has connected anew, messages of its last connection may still arrive.
_MAX_READERS = 2


class Rings:
    """The rings of one mailbox. If they are not used, or this Python can't make any, it writes none and opens none.

    What is read from them goes to pinned memory, if `is_pinned`, from which a GPU copies it several times as fast.
    """

    def __init__(self, *, is_used: bool, is_pinned: bool = False) -> None:
        self._is_used = is_used and hasattr(os, "memfd_create")  # Linux alone, and not with every libc
        self._is_pinned = is_pinned
        self._pid = os.getpid()
        self.writers: dict[str, RingWriter] = {}  # by the peer's name
        self.readers: dict[str, dict[bytes, RingReader]] = {}  # by the sender's key and the ring's token

    def add_writer(self, name: str) -> None:
        """Prepare a ring to a peer; it takes no memory before the first large message."""
        if self._is_used:
            self.writers[name] = RingWriter(name)

    def close_writer(self, name: str) -> None:
        """Close the ring to a peer, if there is one; and those of processes that have ended, whose memory would stay otherwise."""
        writer = self.writers.pop(name, None)
        if writer is not None:
            writer.close()
        self._close_orphans()

    def open_reader(self, key: str, offer: RingOffer) -> None:
        """Open a ring that a sender has offered; if that is not possible, its messages go on as before."""
        if not self._is_used:
            return
        try:
            reader = RingReader(offer, is_pinned=self._is_pinned)
        except (OSError, ProtocolError) as error:
            logger.debug("the shared memory that a peer offers can't be used: %s", error)
            return
        self._close_orphans()
        readers = self.readers.setdefault(key, {})
        before = readers.pop(offer.token, None)
        if before is None and len(readers) == _MAX_READERS:
            before = readers.pop(next(iter(readers)))
        if before is not None:
            before.close()
        readers[offer.token] = reader

    def close_readers(self, key: str) -> None:
        """Close the rings that a sender has offered."""
        for reader in self.readers.pop(key, {}).values():
            reader.close()

    def _close_orphans(self) -> None:
        for key, readers in list(self.readers.items()):
            for token in [token for token, reader in readers.items() if not reader.has_sender]:
                readers.pop(token).close()
            if not readers:
                del self.readers[key]

    def close(self) -> None:
        """Close all rings; does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        while self.writers:
            self.writers.popitem()[1].close()
        for key in list(self.readers):
            self.close_readers(key)

"""A flag that wakes a poll on descriptors, so that one thread can interrupt another's wait.

Knows no mailbox and touches no ZeroMQ socket.
"""

from __future__ import annotations

import contextlib
import socket
import threading


class Waker:
    """A flag with a descriptor that is readable while the flag is set.

    `set` may be called from any thread, a signal handler or a finalizer, at any time, even after `close`.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        # Without it, close() could free the descriptor's number for reuse during a set(). Reentrant, since a signal
        # handler or finalizer may run in the middle of one of these methods.
        self._lock = threading.RLock()
        self._is_set = False

    def fileno(self) -> int:
        """Return the descriptor to poll for input."""
        return self._reader.fileno()

    def set(self) -> None:
        """Set the flag; does nothing once closed."""
        with self._lock:
            self._is_set = True
            with contextlib.suppress(OSError):  # full: readable anyway; or closed
                self._writer.send(b"\0")

    def clear(self) -> bool:
        """Clear the flag; return whether it was set."""
        if not self._is_set:
            return False
        with self._lock:
            self._is_set = False
            with contextlib.suppress(OSError):  # nothing left
                while len(self._reader.recv(4096)) == 4096:
                    pass
            if self._is_set:  # set again by a finalizer that ran in here; its byte may have been read
                self.set()
        return True

    def close(self) -> None:
        """Close both descriptors; does nothing the second time."""
        with self._lock:
            self._writer.close()
            self._reader.close()

"""Wakes a thread that waits, from any other, and from finalizers.

Does not know why.
"""

from __future__ import annotations

import queue


class Wake:
    """What `threading.Event` is for one waiting thread; unlike there, a finalizer may run ``set`` in the middle of another."""

    def __init__(self) -> None:
        self._signals: queue.SimpleQueue[None] = queue.SimpleQueue()  # its `put` alone is reentrant

    def set(self) -> None:
        """Wake the thread, or let its next wait return at once."""
        self._signals.put(None)

    def wait(self) -> None:
        """Wait until `set` has been called since the last wait."""
        self._signals.get()
        while not self._signals.empty():
            self._signals.get()

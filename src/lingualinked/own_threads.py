"""Tells the package's own threads, whose names begin alike, from those of the user.

Knows names of threads; not what they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


def close_from_here(close: Callable[[], None]) -> None:
    """Close what waits for threads of ours; on one of them, where a finalizer may run, in a new thread."""
    if threading.current_thread().name.startswith("lingualinked-"):
        threading.Thread(target=close, name="closing-lingualinked").start()  # a thread can't wait for its own end
    else:
        close()

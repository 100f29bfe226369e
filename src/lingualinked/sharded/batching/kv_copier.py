"""Copies KV between sessions of a continuous batch, on a thread of its own: a copy waits for the stages, as steps go on.

Knows sessions; not why they are copied.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from lingualinked.errors import LingualinkedError
from lingualinked.processes.resources import start_thread

if TYPE_CHECKING:
    from lingualinked.cluster.sessions.session import Session

logger = logging.getLogger("lingualinked.batching")

_Job = tuple["Session", "Session", int, Callable[[bool], None]]


class KVCopier:
    """Copies one after the other; the thread runs from the first one on, until `close`."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start_copy(self, source: Session, target: Session, num_tokens: int, end: Callable[[bool], None]) -> None:
        """Copy the KV of so many tokens to a new session; ``end`` is told, on that thread, whether it succeeded."""
        self._jobs.put((source, target, num_tokens, end))
        if self._thread is None:
            self._thread = threading.Thread(
                target=_run, args=(self._jobs,), name="lingualinked-batching-copies", daemon=True
            )
            start_thread(self._thread)

    def close(self) -> None:
        """End the thread after the copy in progress."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


def _run(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        source, target, num_tokens, end = job
        try:
            if not source.kv_age.is_before_edit:  # else it would be of another model than the rest of the text
                source.copy_to(target, min(num_tokens, source.num_tokens))
        except LingualinkedError as error:
            logger.debug("KV of a common beginning was not copied, so that it is computed: %s", error)
        end(target.num_tokens == num_tokens and not target.ended)
        del job, source, target, end

"""Work that is done beside the worker's loop: one job after the other, in a thread of its own.

Knows callables only; what a job has to say is said on the loop, which alone may touch sockets and sessions.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger("lingualinked.worker")


class Background:
    """A thread for jobs that would hold up the worker's loop.

    Parameters
    ----------
    wake : callable
        Called, on the thread, when there is something for `run_callbacks` to do.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._callbacks: collections.deque[Callable[[], None]] = collections.deque()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job once those before it are done; it raises nothing."""
        self._jobs.put(job)
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="lingualinked-background", daemon=True)
            thread.start()
            self._thread = thread  # only now: what did not start can't be joined

    def stop(self) -> None:
        """End the thread once the jobs that were submitted are done."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def call(self, callback: Callable[[], None]) -> None:
        """Have something done on the worker's loop; called by jobs."""
        self._callbacks.append(callback)
        self._wake()

    def run_callbacks(self) -> None:
        """Do what jobs have asked for; called by the loop."""
        while self._callbacks:
            try:
                self._callbacks.popleft()()
            except Exception:  # the loop serves others
                logger.exception("what a job asked for could not be done")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

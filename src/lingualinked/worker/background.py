"""A thread for work beside the worker's loop, which runs one job after another.

Knows callables only. Jobs report through callbacks on the loop, which alone may touch sockets and sessions.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger("lingualinked.worker")


class Background:
    """A thread for jobs that would block the worker's loop; calls `wake` when `run_callbacks` has something to do."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._callbacks: collections.deque[Callable[[], None]] = collections.deque()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after those before it; it must not raise."""
        self._jobs.put(job)
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="lingualinked-background", daemon=True)
            thread.start()
            self._thread = thread  # only now: a thread that did not start can't be joined

    def stop(self) -> None:
        """End the thread after the jobs that were submitted."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def call_on_loop(self, callback: Callable[[], None]) -> None:
        """Run a callback on the worker's loop; for use by jobs."""
        self._callbacks.append(callback)
        self._wake()

    def run_callbacks(self) -> None:
        """Run the callbacks of jobs; called by the loop."""
        while self._callbacks:
            try:
                self._callbacks.popleft()()
            except Exception:  # the loop must go on
                logger.exception("the callback of a background job failed")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

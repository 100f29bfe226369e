"""A thread for work beside the worker's loop, which runs one job after another.

Knows callables only. Jobs report through callbacks on the loop, which alone may touch sockets and sessions.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
from collections.abc import Callable

logger = logging.getLogger("lingualinked.worker")


class Background:
    """A thread for jobs that would block the worker's loop; calls `wake` when `run_callbacks` has something to do."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lingualinked-background")
        self._callbacks: collections.deque[Callable[[], None]] = collections.deque()

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after those before it; it must not raise."""
        self._executor.submit(job)

    def stop(self) -> None:
        """End the thread after the jobs that were submitted."""
        self._executor.shutdown()

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

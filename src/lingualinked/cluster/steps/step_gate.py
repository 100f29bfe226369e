"""Lets a change of a model wait until no step runs, and steps wait until it is done.

Knows threads only; neither steps nor changes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator

from lingualinked.errors import StepTimeoutError
from lingualinked.interrupts import wait_in_pieces


class StepGate:
    """Many steps run at once, and no step while a change does, except those whose own hooks make it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running: Counter[Hashable] = Counter()  # steps, by the threads that run them, or by their own keys
        self._runs: list[Callable[[], None]] = []  # what ends each of the runs
        self._num_changes = 0  # that run, or wait for steps to end

    @contextlib.contextmanager
    def step(self, key: Hashable = None, end_run: Callable[[], None] | None = None) -> Iterator[None]:
        """Run a step in this context; waits for changes, unless this thread is in a hook of another step.

        A step that another thread ends has a key of its own. A change calls ``end_run`` so that it needn't wait for all of a run.
        """
        thread = threading.get_ident()
        user = thread if key is None else key
        with self._condition:
            if self._num_changes and not self._running[thread]:
                self._wait(lambda: not self._num_changes, threading.TIMEOUT_MAX)
            self._running[user] += 1
            if end_run is not None:
                self._runs.append(end_run)
        try:
            yield
        finally:
            with self._condition:
                self._running[user] -= 1
                if end_run is not None:
                    self._runs.remove(end_run)
                if not self._running[user]:
                    del self._running[user]
                    if self._num_changes:
                        self._condition.notify_all()

    @contextlib.contextmanager
    def change(self, timeout_s: float) -> Iterator[None]:
        """Make a change in this context, between steps; in a hook, which a step waits for, at once."""
        if self._running.get(threading.get_ident()):
            yield
            return
        with self._condition:
            self._num_changes += 1
            runs = [*self._runs]
        for end_run in runs:
            end_run()
        try:
            with self._condition:
                if not self._wait(lambda: not self._running, timeout_s):
                    raise StepTimeoutError(
                        f"weights can't change while steps run, and these did not end within timeout_s={timeout_s:g}: does a hook wait?"
                    )
            yield
        finally:
            with self._condition:
                self._num_changes -= 1
                self._condition.notify_all()

    def _wait(self, is_free: Callable[[], bool], timeout_s: float) -> bool:
        return wait_in_pieces(lambda left_s: self._condition.wait_for(is_free, left_s), timeout_s)

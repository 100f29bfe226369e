"""Who uses a session at the moment: one thread with its steps, or a change to another route.

Knows threads only; neither steps nor routes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from lingualinked.cluster.step_gate import StepGate
from lingualinked.errors import ArgumentError


class SessionUse:
    """Keeps threads that step a session, and changes of its route, from overlapping."""

    def __init__(self, gate: StepGate) -> None:
        self._gate = gate
        self._in_use = threading.Lock()
        self._rests = threading.Event()  # unless steps run
        self._rests.set()
        self._changing = threading.Lock()  # held while steps run, and while it changes to another route

    @property
    def is_in_use(self) -> bool:
        """Whether a thread runs steps."""
        return self._in_use.locked()

    @contextlib.contextmanager
    def for_steps(self) -> Iterator[None]:
        """Run steps in this context; waits for changes of the model and of the route. ArgumentError if another thread does."""
        with self.alone():
            self._rests.clear()
            try:
                with self._gate.step(), self._changing:
                    yield
            finally:
                self._rests.set()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let no thread run steps in this context; raise ArgumentError if one does already."""
        if not self._in_use.acquire(blocking=False):
            raise ArgumentError("past_key_values is in use by another thread: a session runs one step at a time")
        try:
            yield
        finally:
            self._in_use.release()

    @contextlib.contextmanager
    def for_change(self) -> Iterator[None]:
        """Change the route in this context; waits for steps."""
        with self._changing:
            yield

    def wait_for_rest(self, timeout_s: float) -> bool:
        """Wait until no step runs; return whether that is so."""
        return self._rests.wait(timeout_s)

"""Who uses a session at the moment: one thread with its steps, or a change to another route.

Knows threads only; neither steps nor routes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from lingualinked.cluster.steps.step_gate import StepGate
from lingualinked.errors import ArgumentError


class SessionUse:
    """Keeps threads that step a session, and changes of its route, from overlapping."""

    def __init__(self, gate: StepGate) -> None:
        self._gate = gate
        self._in_use = threading.Lock()
        self._rests = threading.Event()  # unless steps run
        self._rests.set()
        self._changing = threading.Lock()  # held while steps run, and while it changes to another route
        self._counting = threading.Lock()
        self._num_packed = 0  # packed steps that it is part of

    @property
    def is_in_use(self) -> bool:
        """Whether a thread runs steps."""
        return self._in_use.locked()

    @contextlib.contextmanager
    def for_steps(self, end_run: Callable[[], None] | None = None) -> Iterator[None]:
        """Run steps in this context; waits for changes of the model and of the route. ArgumentError if another thread does.

        A run ends soon once ``end_run`` is called.
        """
        with self.alone():
            self._rests.clear()
            try:
                with self._gate.step(end_run and object(), end_run), self._changing:
                    yield
            finally:
                self._rests.set()

    @contextlib.contextmanager
    def for_packed_step(self, on_first: Callable[[], None]) -> Iterator[None]:
        """Be part of a packed step in this context, which any thread may leave; of several at once, `on_first` in the first one.

        Waits for changes of the route; raises ArgumentError if other steps run.
        """
        with self._counting:
            if not self._num_packed:
                self._begin_packed(on_first)
            self._num_packed += 1
        try:
            yield
        finally:
            with self._counting:
                self._num_packed -= 1
                if not self._num_packed:
                    self._packed.close()

    def _begin_packed(self, on_first: Callable[[], None]) -> None:
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.alone())
            self._rests.clear()
            undo.callback(self._rests.set)
            undo.enter_context(self._changing)
            on_first()
            self._packed = undo.pop_all()

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

"""Steps that stop at hooked modules: each runs in a thread of its own, but only while the worker's loop waits for it.

So only one thread computes, or uses a socket, at any time. Knows threads and keys; neither modules nor messages.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from lingualinked.errors import ProtocolError
from lingualinked.quantities import count_text

StepKey = tuple[int, int, int]
"""A step's model, plan version and session; a session has one step at a time."""


_MAX_PAUSED = 1000  # each has a thread


class _AbandonedError(BaseException):
    """A step that is paused has to end; not an Exception, which what it runs might catch."""


class _StepThread:
    """A thread that runs one step after another, and the hand-over of control between it and the loop's thread."""

    def __init__(self) -> None:
        self._inputs: queue.SimpleQueue[Any] = (
            queue.SimpleQueue()
        )  # a step to run, or what resumes it; None ends the thread
        self._outcomes: queue.SimpleQueue[BaseException | bool] = queue.SimpleQueue()  # whether it has ended, or why
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run_steps, name="lingualinked-step", daemon=True)
        self._thread.start()

    def advance(self, given: Any) -> BaseException | bool:
        """Run a step, or resume it with what it waits for; return whether it has ended, rather than paused, or its error."""
        self._inputs.put(given)
        return self._outcomes.get()

    def end(self) -> None:
        """End the thread, which runs no step."""
        self._inputs.put(None)
        self._thread.join()

    def _run_steps(self) -> None:
        torch.set_num_threads(self._num_threads)  # OpenMP counts per thread, and the count determines bits
        while (run := self._inputs.get()) is not None:
            outcome: BaseException | bool = True
            try:
                run(self._pause)
            except _AbandonedError:
                pass
            except BaseException as error:  # noqa: BLE001 - the loop raises it
                outcome = error
            del run
            self._outcomes.put(outcome)
            del outcome

    def _pause(self) -> Any:
        """Let the loop go on; return what resumes the step."""
        self._outcomes.put(False)
        answer = self._inputs.get()
        if isinstance(answer, _AbandonedError):
            raise answer
        return answer


class PausedSteps:
    """The steps of a worker that wait for the hooks of a module to have run."""

    def __init__(self) -> None:
        self._threads: dict[StepKey, _StepThread] = {}
        self._idle: _StepThread | None = None  # for the next step: a new thread would compute with cold memory

    def check_room(self, key: StepKey) -> None:
        """Raise ProtocolError if a step of this session is paused already, or too many others are."""
        if key in self._threads:
            raise ProtocolError(f"a step arrived of session {key[2]}, of which another one waits for hooks here")
        if len(self._threads) >= _MAX_PAUSED:
            raise ProtocolError(f"{count_text(len(self._threads), 'step')} wait for hooks here, and no more may")

    def start_step(self, key: StepKey, run: Callable[[Callable[[], Any]], None]) -> None:
        """Run a step until it ends, or calls what it is given, which pauses it and returns what it is resumed with."""
        thread, self._idle = self._idle or _StepThread(), None
        self._advance(key, thread, run)

    def resume_step(self, key: StepKey, answer: Any) -> None:
        """Resume a step; raise ProtocolError if it is not paused."""
        thread = self._threads.pop(key, None)
        if thread is None:
            raise ProtocolError(f"no step of session {key[2]} waits for hooks here")
        self._advance(key, thread, answer)

    def abandon_step(self, key: StepKey) -> None:
        """End a step if it is paused."""
        thread = self._threads.pop(key, None)
        if thread is not None:
            self._advance(key, thread, _AbandonedError())

    def abandon_steps(self, model: int, session: int | None = None) -> None:
        """End the paused steps of a session, or of all sessions of a model."""
        for key in [key for key in self._threads if key[0] == model and session in (None, key[2])]:
            self.abandon_step(key)

    def _advance(self, key: StepKey, thread: _StepThread, given: Any) -> None:
        outcome = thread.advance(given)
        if outcome is False:
            self._threads[key] = thread
        elif self._idle is None:
            self._idle = thread
        else:
            thread.end()
        if isinstance(outcome, BaseException):
            raise outcome

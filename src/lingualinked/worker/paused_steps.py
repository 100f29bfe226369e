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

StepKey = tuple[int, int, int]
"""A step's model, plan version and session; a session has one step at a time."""


class _AbandonedError(BaseException):
    """A step that is paused has to end; not an Exception, which what it runs might catch."""


class _StepThread:
    """One step, and the hand-over of control between its thread and the loop's."""

    def __init__(self, run: Callable[[Callable[[], Any]], None]) -> None:
        self._run = run
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._returns: queue.SimpleQueue[BaseException | bool] = queue.SimpleQueue()  # whether it has ended, or why
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run_to_end, name="lingualinked-step", daemon=True)

    def start(self) -> bool:
        """Run until the step pauses or ends; return whether it has ended."""
        self._thread.start()
        return self._wait()

    def resume(self, answer: Any) -> bool:
        """Hand over what the step waits for, and run it on until it pauses or ends; return whether it has ended."""
        self._answers.put(answer)
        return self._wait()

    def _wait(self) -> bool:
        outcome = self._returns.get()
        if outcome is not False:
            self._thread.join()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _run_to_end(self) -> None:
        outcome: BaseException | bool = True
        try:
            torch.set_num_threads(self._num_threads)  # OpenMP counts per thread, and the count determines bits
            self._run(self._pause)
        except _AbandonedError:
            pass
        except BaseException as error:  # noqa: BLE001 - the loop raises it
            outcome = error
        self._returns.put(outcome)

    def _pause(self) -> Any:
        """Let the loop go on; return what resumes the step."""
        self._returns.put(False)
        answer = self._answers.get()
        if isinstance(answer, _AbandonedError):
            raise answer
        return answer


class PausedSteps:
    """The steps of a worker that wait for the hooks of a module to have run."""

    def __init__(self) -> None:
        self._threads: dict[StepKey, _StepThread] = {}

    def start_step(self, key: StepKey, run: Callable[[Callable[[], Any]], None]) -> None:
        """Run a step until it ends, or calls what it is given, which pauses it and returns what it is resumed with."""
        self._advance(key, _StepThread(run), _StepThread.start)

    def resume_step(self, key: StepKey, answer: Any) -> None:
        """Resume a step; raise ProtocolError if it is not paused."""
        thread = self._threads.pop(key, None)
        if thread is None:
            raise ProtocolError(f"no step of session {key[2]} waits for hooks here")
        self._advance(key, thread, lambda each: each.resume(answer))

    def abandon_steps(self, model: int, session: int | None = None) -> None:
        """End the paused steps of a session, or of all sessions of a model."""
        for key in [key for key in self._threads if key[0] == model and session in (None, key[2])]:
            self._threads.pop(key).resume(_AbandonedError())

    def _advance(self, key: StepKey, thread: _StepThread, move: Callable[[_StepThread], bool]) -> None:
        if not move(thread):
            self._threads[key] = thread

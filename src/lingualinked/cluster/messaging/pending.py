"""The answers that the caller waits for, and what makes them fail.

Knows futures, devices and deadlines, and the time from its arguments; neither messages nor sockets.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

from lingualinked.errors import LingualinkedError, StepTimeoutError
from lingualinked.interrupts import wait_in_pieces

_T = TypeVar("_T")
Key = tuple[str, int, int]
"""What an answer is recognised by: its kind and two numbers."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Pending:
    """One answer that is due."""

    devices: frozenset[str]  # without which it can't come
    asked: str  # the device that is to give it
    answer: type  # of message
    model: int | None  # it is of no use once that is unloaded
    what: str  # was asked, for the time-out's message
    timeout_s: float
    deadline: float  # in monotonic seconds
    on_progress: Callable[[int], None] | None = None  # told the bytes loaded so far
    part_senders: tuple[str, ...] = ()  # each sends a part besides the answer; they arrive in any order
    parts: dict[int, object] = dataclasses.field(default_factory=dict)  # by the place of the sender
    passes_cuts: bool = False  # whether its answer comes over a link that is cut
    takes_hooks: bool = False  # whether it may be interrupted by hooks
    on_tokens: Callable[[object], bool] | None = None  # told the tokens of each step of a run; whether more are due
    paused_at: str = ""  # the module whose hooks run in this process at the moment
    held_answer: object = None  # which came before the last part
    future: concurrent.futures.Future[object] = dataclasses.field(default_factory=concurrent.futures.Future)

    def awaits_part(self, place: int, sender: str) -> bool:
        """Say whether a part is due from this sender in this place; each comes once."""
        return place not in self.parts and (place, sender) in enumerate(self.part_senders)

    @property
    def missing(self) -> str:
        """What has not arrived, though the answer itself has, for the time-out's message."""
        if self.held_answer is None:
            return "no answer"
        senders = [sender for place, sender in enumerate(self.part_senders) if place not in self.parts]
        return f"its answer, but not what {', '.join(map(repr, dict.fromkeys(senders)))} recorded,"


def result_of(future: concurrent.futures.Future[_T]) -> _T:
    """Wait for a future as its ``result`` does, but raise interrupts only between two waits.

    An interrupt within a wait could leave the future's lock acquired, and the thread that completes the future would block for
    ever.

    An error leads through its traceback to every frame that it has passed, and a variable there that holds the future leads
    back to the error. Such a circle, with all that those frames hold, tensors too, would last until Python's collector
    runs. So no frame that the error passes may name the future: here it is deleted, and callers write what makes the future in
    the call itself.
    """
    wait_in_pieces(functools.partial(_is_done, future), math.inf)
    try:
        return future.result()
    finally:
        del future


def results_of(futures: list[concurrent.futures.Future[_T]]) -> list[_T]:
    """Wait for futures and return their results; the first that fails ends the wait for the others.

    The list is emptied, so that no future is named where its error passes (`result_of`).
    """

    def is_decided(timeout_s: float) -> bool:
        done, left = concurrent.futures.wait(futures, timeout_s, concurrent.futures.FIRST_EXCEPTION)
        return not left or any(future.exception() is not None for future in done)

    wait_in_pieces(is_decided, math.inf)
    has_failed = [future.done() and future.exception() is not None for future in futures]
    if any(has_failed):
        futures[:] = [futures[has_failed.index(True)]]
    results = []
    while futures:
        results.append(result_of(futures.pop(0)))
    return results


def settle(future: concurrent.futures.Future[_T], work: Callable[[], _T]) -> None:
    """Do some work and put its result, or its error, in a future, which is not named while the error passes (`result_of`)."""
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - the waiter raises it again
        future.set_exception(error)
    finally:
        del future


def _is_done(future: concurrent.futures.Future[_T], timeout_s: float) -> bool:
    try:
        future.exception(timeout_s)
    except TimeoutError:
        return future.done()
    return True


class PendingAnswers:
    """All answers that are due; used by one thread.

    Every failed future gets an error of its own, made by the callable that is passed: one that was raised in several
    threads would collect all their frames.
    """

    def __init__(self) -> None:
        self._pending: dict[Key, Pending] = {}

    def add(self, key: Key, pending: Pending) -> None:
        """Await an answer."""
        assert key not in self._pending
        self._pending[key] = pending

    def find(self, key: Key) -> Pending | None:
        """Return the answer that is due, if it is."""
        return self._pending.get(key)

    def complete(self, key: Key, answer: object) -> None:
        """Complete the future of an answer once all parts are there; does nothing if nobody waits for it any more."""
        pending = self._pending.get(key)
        if pending is None:
            return
        if len(pending.parts) < len(pending.part_senders):
            pending.held_answer = answer
            return
        del self._pending[key]
        pending.future.set_result(answer)

    def add_part(self, key: Key, place: int, part: object) -> None:
        """Add a part of an answer; does nothing if nobody waits for it any more."""
        pending = self._pending.get(key)
        if pending is not None:
            pending.parts[place] = part
            if pending.held_answer is not None:
                self.complete(key, pending.held_answer)

    def pause(self, key: Key, path: str, event: object, now: float) -> bool:
        """Complete the future of an answer with an event, which the answer follows in another future; restart its time-out.

        The event is told that future. Return whether anybody waits for the answer.
        """
        pending = self._pending.get(key)
        if pending is not None:
            reached, pending.future = pending.future, concurrent.futures.Future()
            pending.paused_at, pending.deadline = path, now + pending.timeout_s
            reached.set_result((event, pending.future))
        return pending is not None

    def resume(self, key: Key, now: float) -> bool:
        """Await an answer again after a pause; return whether anybody waits for it."""
        pending = self._pending.get(key)
        if pending is not None:
            pending.paused_at, pending.deadline = "", now + pending.timeout_s
        return pending is not None

    def report(self, key: Key, reply: object, now: float) -> None:
        """Report what a step of a run has given, and restart the time-out; the answer is complete with the last one.

        What is not what was due raises a LingualinkedError, and the answer fails with it.
        """
        pending = self._pending.get(key)
        if pending is None or pending.on_tokens is None:
            return
        pending.deadline = now + pending.timeout_s
        try:
            goes_on = pending.on_tokens(reply)
        except LingualinkedError as error:
            self.fail(key, error.with_traceback(None))
        else:
            if not goes_on:
                self.complete(key, reply)

    def fail(self, key: Key, error: Exception) -> None:
        """Fail one answer; does nothing if it is no longer pending."""
        pending = self._pending.pop(key, None)
        if pending is not None:
            pending.future.set_exception(error)

    def progress(self, key: Key, num_done: int, now: float) -> None:
        """Report progress, and restart the answer's time-out."""
        pending = self._pending.get(key)
        if pending is not None:
            pending.deadline = now + pending.timeout_s
            if pending.on_progress is not None:
                pending.on_progress(num_done)

    def fail_device(self, device: str, make_error: Callable[[], LingualinkedError]) -> None:
        """Fail what needs a device."""
        self._fail_where(lambda _, pending: device in pending.devices, make_error)

    def fail_model(self, model: int, make_error: Callable[[], LingualinkedError]) -> None:
        """Fail what is for a model."""
        self._fail_where(lambda _, pending: pending.model == model, make_error)

    def fail_session(self, session: int, make_error: Callable[[], LingualinkedError]) -> None:
        """Fail the steps of a session, in a run too."""
        self._fail_where(lambda key, _: key[0] in ("step", "run") and key[1] == session, make_error)

    def fail_all(self, make_error: Callable[[], LingualinkedError]) -> None:
        """Fail everything."""
        self._fail_where(lambda *_: True, make_error)

    def expire(self, now: float) -> None:
        """Fail what is late at ``now`` (monotonic seconds)."""
        for key, pending in list(self._pending.items()):
            if pending.deadline <= now:
                late = f"{pending.what} got {pending.missing} within timeout_s={pending.timeout_s:g}: is a worker stopped or overloaded?"
                slow = (
                    f"the hooks of {pending.paused_at} did not return within timeout_s={pending.timeout_s:g}: raise it"
                )
                error = slow if pending.paused_at else late
                self.fail(key, StepTimeoutError(error))

    def time_left(self, now: float) -> float | None:
        """Seconds until the next answer is late; ``None`` if none is due."""
        if not self._pending:
            return None
        return max(0.0, min(pending.deadline for pending in self._pending.values()) - now)

    def _fail_where(self, holds: Callable[[Key, Pending], bool], make_error: Callable[[], LingualinkedError]) -> None:
        for key in [key for key, pending in self._pending.items() if holds(key, pending)]:
            self.fail(key, make_error())

"""No Ctrl-C is lost: what was interrupted ends in `KeyboardInterrupt`, wherever the interrupt arrived.

Python raises it between any two instructions of the main thread, where a finalizer or a callback may swallow it and an import may
turn it into another error. Knows signals only, not what is interrupted.
"""

from __future__ import annotations

import _thread
import concurrent.futures
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_REMIND_EVERY_S = 0.1
_guard: _Guard | None = None  # the one in force, in the main thread


def interruptible(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a call end in `KeyboardInterrupt` if it is interrupted, whatever becomes of the first exception.

    Holds in the main thread while the handler of interrupts is Python's own: a handler that the user has set stays in force,
    and no other thread is ever interrupted.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _guard is not None or not _can_guard():
            return function(*args, **kwargs)
        guard = _Guard()
        try:
            try:
                guard.enter()
                result = function(*args, **kwargs)
            finally:
                guard.leave()
        except KeyboardInterrupt:
            guard.leave()  # again: the interrupt may have come just before the first
            raise
        except BaseException as error:
            if guard.was_interrupted:
                raise KeyboardInterrupt from error
            raise
        if guard.was_interrupted:
            raise KeyboardInterrupt
        return result

    return call


def uninterrupted(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a call that takes bounded time run to its end before an interrupt is raised, so that nothing is left half done."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        guard = _guard
        if guard is None or guard.thread != _thread.get_ident():
            return function(*args, **kwargs)
        guard.num_deferring += 1
        try:
            return function(*args, **kwargs)
        finally:
            guard.num_deferring -= 1
            guard.raise_if_lost()

    return interruptible(call)


def result_of(future: concurrent.futures.Future[_R]) -> _R:
    """Wait for a future as its ``result`` does; an interrupt is raised between two waits.

    Raised within one, it could leave the future's lock taken, and who is to complete it would wait for ever.
    """
    wait_in_pieces(functools.partial(_is_done, future), math.inf)
    try:
        return future.result()
    finally:
        del future  # its error would lead to this frame and back, and only the collector would free it


def wait_for_event(event: threading.Event, timeout_s: float) -> bool:
    """Wait for an event as its ``wait`` does; an interrupt is raised between two waits, as in `result_of`."""
    return wait_in_pieces(event.wait, timeout_s)


def _is_done(future: concurrent.futures.Future[_R], timeout_s: float) -> bool:
    try:
        future.exception(timeout_s)
    except TimeoutError:
        return future.done()
    return True


def wait_in_pieces(wait: Callable[[float], bool], timeout_s: float) -> bool:
    """Wait for something that says whether it has come within so many seconds; an interrupt is raised between two waits."""
    guard = _guard
    if guard is None or guard.thread != _thread.get_ident():
        return wait(min(timeout_s, threading.TIMEOUT_MAX))
    deadline = time.monotonic() + timeout_s
    is_done = False
    guard.num_deferring += 1
    try:
        while not is_done and not guard.was_interrupted and (left_s := deadline - time.monotonic()) > 0:
            is_done = wait(min(left_s, _REMIND_EVERY_S))
    finally:
        guard.num_deferring -= 1
    guard.raise_if_lost()
    return is_done


class _Guard:
    def __init__(self) -> None:
        self.thread = _thread.get_ident()
        self.was_interrupted = False
        self.num_deferring = 0
        self._handled_before = sys.exc_info()[1]
        self._is_reminder = False
        self._has_left = False
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Handle interrupts from now on."""
        global _guard  # noqa: PLW0603 - as signal handlers are
        _guard = self
        signal.signal(signal.SIGINT, self._handle)

    def leave(self) -> None:
        """Give interrupts back to Python; does nothing the second time."""
        global _guard  # noqa: PLW0603
        self.num_deferring += 1  # what comes from here on is noted, and raised once all is as it was
        with self._lock:
            self._has_left = True
        time.sleep(0)  # a reminder that is under way arrives here
        if _guard is self:
            if signal.getsignal(signal.SIGINT) == self._handle:  # else a handler has been set meanwhile, and stays
                signal.signal(signal.SIGINT, signal.default_int_handler)
            _guard = None

    def raise_if_lost(self) -> None:
        """Raise the interrupt that has come, unless it is being dealt with or has to wait."""
        if self.was_interrupted and not self.num_deferring and not self._is_on_its_way_up():
            raise KeyboardInterrupt

    def _is_on_its_way_up(self) -> bool:
        """Whether an interrupt is what is being handled, or what that came from."""
        error = sys.exc_info()[1]
        while error is not None and error is not self._handled_before:
            if isinstance(error, KeyboardInterrupt):
                return True
            error = error.__context__
        return False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if _guard is not self:  # whoever had set another handler meanwhile has put this one back too late
            raise KeyboardInterrupt
        is_reminder, self._is_reminder = self._is_reminder, False
        if not self.was_interrupted:
            self.was_interrupted = True
            _thread.start_new_thread(self._remind, ())  # the lock of threading may be this thread's, a moment ago
        if is_reminder:
            self.raise_if_lost()
        elif not self.num_deferring:
            raise KeyboardInterrupt  # the user's own second Ctrl-C, too, whatever it interrupts

    def _remind(self) -> None:
        """Interrupt the main thread again and again until the call has ended: what swallowed the first is over by then."""
        while True:
            time.sleep(_REMIND_EVERY_S)
            with self._lock:
                if self._has_left or signal.getsignal(signal.SIGINT) != self._handle:
                    return
                self._is_reminder = True
                signal.pthread_kill(self.thread, signal.SIGINT)  # to that thread: its waits end only so


def _can_guard() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and hasattr(signal, "pthread_kill") and signal.getsignal(signal.SIGINT) is signal.default_int_handler

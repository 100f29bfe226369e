"""Makes every interrupted call end in `KeyboardInterrupt`, wherever the interrupt arrived.

Python raises it between any two instructions of the main thread, where a finalizer or a callback may swallow it and an import may
turn it into another error. Knows signals only, not what is interrupted.
"""

from __future__ import annotations

import _thread
import functools
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
_guard: _Guard | None = None  # the active one, of the main thread


def interruptible(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make an interrupted call end in `KeyboardInterrupt`, even if something swallows the first exception.

    This works in the main thread while Python's own interrupt handler is set: a handler that the user has set stays in force,
    and no other thread is ever interrupted.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _guard is not None or not _can_guard():
            return function(*args, **kwargs)
        guard = _Guard()
        results: list[_R] = []
        try:
            try:
                guard.enter()
                results.append(function(*args, **kwargs))
            finally:
                guard.leave()
        except KeyboardInterrupt:
            guard.leave()  # again: the interrupt may have come just before the first call
            results.clear()  # the traceback would keep what was made, such as a model with its workers
            raise
        except BaseException as error:
            if guard.was_interrupted:
                raise KeyboardInterrupt from error
            raise
        if guard.was_interrupted:
            results.clear()
            raise KeyboardInterrupt
        return results.pop()

    return call


def uninterrupted(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a call run to its end before an interrupt is raised; for short calls that must not be left half done."""

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


def wait_in_pieces(wait: Callable[[float], bool], timeout_s: float) -> bool:
    """Call ``wait`` with short time-outs until it returns true or the time is up; raise interrupts between two calls."""
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
        """Install the handler."""
        global _guard  # noqa: PLW0603 - as signal handlers are
        _guard = self
        signal.signal(signal.SIGINT, self._handle)

    def leave(self) -> None:
        """Restore Python's handler; a second call does nothing."""
        global _guard  # noqa: PLW0603
        self.num_deferring += 1  # an interrupt from here on is recorded, and raised once the state is restored
        with self._lock:
            self._has_left = True
        time.sleep(0)  # a pending reminder arrives here
        if _guard is self:
            if signal.getsignal(signal.SIGINT) == self._handle:  # else another handler has been set meanwhile and stays
                signal.signal(signal.SIGINT, signal.default_int_handler)
            _guard = None

    def raise_if_lost(self) -> None:
        """Raise the recorded interrupt, unless it is already propagating or must wait."""
        if self.was_interrupted and not self.num_deferring and not self._is_propagating():
            raise KeyboardInterrupt

    def _is_propagating(self) -> bool:
        """Whether the exception being handled is an interrupt or was raised while one was handled."""
        error = sys.exc_info()[1]
        while error is not None and error is not self._handled_before:
            if isinstance(error, KeyboardInterrupt):
                return True
            error = error.__context__
        return False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if _guard is not self:  # another handler was set meanwhile, and this one was restored too late
            raise KeyboardInterrupt
        is_reminder, self._is_reminder = self._is_reminder, False
        if not self.was_interrupted:
            self.was_interrupted = True
            # Not threading.Thread: this thread may hold the lock of threading.
            _thread.start_new_thread(self._remind, ())
        if is_reminder:
            self.raise_if_lost()
        elif not self.num_deferring:
            raise KeyboardInterrupt  # also for the user's own second Ctrl-C

    def _remind(self) -> None:
        """Interrupt the main thread repeatedly until the call has ended, in case something swallows the first interrupts."""
        while True:
            time.sleep(_REMIND_EVERY_S)
            with self._lock:
                if self._has_left or signal.getsignal(signal.SIGINT) != self._handle:
                    return
                self._is_reminder = True
                signal.pthread_kill(self.thread, signal.SIGINT)  # only a signal to that thread ends its waits


def _can_guard() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and hasattr(signal, "pthread_kill") and signal.getsignal(signal.SIGINT) is signal.default_int_handler

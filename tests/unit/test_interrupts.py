"""No interrupt is lost, none is raised twice, and the user's own handlers stay."""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lingualinked import interrupts
from lingualinked.interrupts import interruptible, uninterrupted

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def handler_stays() -> Iterator[None]:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert interrupts._guard is None


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def swallowed_by_finalizer() -> None:
    class Finalized:
        def __del__(self) -> None:
            interrupt()

    Finalized()


def swallowed_by_weakref_callback() -> None:
    class Referred:
        pass

    referred = Referred()
    reference = weakref.ref(referred, lambda _: interrupt())
    del referred
    assert reference() is None


def swallowed_by_finalize() -> None:
    class Referred:
        pass

    referred = Referred()
    weakref.finalize(referred, interrupt)
    del referred


def swallowed_by_callback() -> None:
    with contextlib.suppress(BaseException):
        interrupt()


def swallowed_by_log_handler() -> None:
    class Careless(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with contextlib.suppress(BaseException):
                interrupt()

    logger = logging.getLogger("careless")
    handler = Careless()
    logger.addHandler(handler)
    logger.error("lost")
    logger.removeHandler(handler)


def turned_into_another_error() -> None:
    try:
        interrupt()
    except BaseException as error:
        raise ModuleNotFoundError("could not be imported") from error


def raised() -> None:
    interrupt()


PLACES = [
    swallowed_by_finalizer,
    swallowed_by_weakref_callback,
    swallowed_by_finalize,
    swallowed_by_callback,
    swallowed_by_log_handler,
    turned_into_another_error,
    raised,
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_ends_the_call_wherever_it_arrives(place: Callable[[], None]) -> None:
    with pytest.raises(KeyboardInterrupt):
        interruptible(place)()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", [place for place in PLACES if place.__name__.startswith("swallowed")])
def test_it_ends_a_call_that_waits(place: Callable[[], None]) -> None:
    """It does not have to come to its end: a reminder interrupts its wait."""

    def wait() -> None:
        place()
        assert not threading.Event().wait(WAIT_S), "nobody sets it"
        raise AssertionError("waited to the end")

    with pytest.raises(KeyboardInterrupt):
        interruptible(wait)()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_left", [False, True], ids=["before its end", "as it is left"])
def test_what_an_interrupted_call_has_made_is_freed_at_once(monkeypatch: pytest.MonkeyPatch, is_left: bool) -> None:
    class Made:
        pass

    references = []
    leave = interrupts._Guard.leave

    def leave_interrupted(guard: Any) -> None:
        monkeypatch.undo()
        leave(guard)
        raise KeyboardInterrupt

    @interruptible
    def make() -> Made:
        made = Made()
        references.append(weakref.ref(made))
        if is_left:
            monkeypatch.setattr(interrupts._Guard, "leave", leave_interrupted)
        else:
            swallowed_by_callback()
        return made

    try:
        make()
    except KeyboardInterrupt:  # whose traceback has the frames of the call
        assert references[0]() is None
    else:
        raise AssertionError("the interrupt is lost")


def test_an_import_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers imports its modules: any error becomes one that says that the module is missing."""
    (tmp_path / "interrupted_import.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    monkeypatch.syspath_prepend(tmp_path)

    def load() -> Any:
        try:
            return importlib.import_module("interrupted_import")
        except BaseException as error:
            raise ModuleNotFoundError("is missing") from error

    with pytest.raises(KeyboardInterrupt):
        interruptible(load)()
    assert "interrupted_import" not in sys.modules


def test_what_cleans_up_after_an_interrupt_is_not_interrupted_again() -> None:
    done = []

    def work() -> None:
        try:
            interrupt()
        finally:
            time.sleep(5 * interrupts._REMIND_EVERY_S)  # reminders come meanwhile
            with contextlib.suppress(ValueError):
                int("x")
            time.sleep(2 * interrupts._REMIND_EVERY_S)
            done.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        interruptible(work)()
    assert done == ["cleaned up"]


def test_a_second_interrupt_ends_the_cleaning_up() -> None:
    def work() -> None:
        try:
            interrupt()
        finally:
            interrupt()
            raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        interruptible(work)()


def test_what_may_not_be_left_half_done_is_done_first() -> None:
    done = []

    @uninterrupted
    def bookkeeping() -> None:
        interrupt()
        time.sleep(3 * interrupts._REMIND_EVERY_S)
        done.append("all of it")

    def work() -> None:
        bookkeeping()
        done.append("more")

    for call in (interruptible(work), bookkeeping, work):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            call()
        assert done == ["all of it"]


def test_calls_within_calls_are_one() -> None:
    outcomes = []

    @interruptible
    def inner() -> None:
        with contextlib.suppress(BaseException):
            interrupt()

    @interruptible
    def outer() -> None:
        inner()
        outcomes.append("inner returned")
        assert not threading.Event().wait(WAIT_S)

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert outcomes in ([], ["inner returned"])


def test_results_errors_and_names_pass_through() -> None:
    @interruptible
    def divide(a: int, b: int = 1) -> float:
        """Divide."""
        return a / b

    assert divide(4, b=2) == 2
    assert (divide.__name__, divide.__doc__) == ("divide", "Divide.")
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)


def test_a_handler_of_the_users_stays() -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("interrupted"))
    try:
        assert interruptible(lambda: [interrupt(), 3][1])() == 3
        assert uninterrupted(lambda: [interrupt(), 3][1])() == 3
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["interrupted", "interrupted"]


def test_a_handler_that_is_set_within_a_call_stays() -> None:
    seen = []

    def set_handler() -> object:
        before = signal.signal(signal.SIGINT, lambda *_: seen.append("interrupted"))
        interrupt()
        return before

    try:
        before = interruptible(set_handler)()
        interrupt()
        assert seen == ["interrupted", "interrupted"]
        signal.signal(signal.SIGINT, before)  # too late: the call is over
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_need_nothing() -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(interruptible(uninterrupted(lambda: 3))()))
    thread.start()
    thread.join()
    assert results == [3]


def test_no_interrupt_comes_after_the_call() -> None:
    """Reminders end with it, even if it ends in the moment in which one is sent."""
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            interruptible(swallowed_by_callback)()
        time.sleep(interrupts._REMIND_EVERY_S / 9)
    time.sleep(2 * interrupts._REMIND_EVERY_S)

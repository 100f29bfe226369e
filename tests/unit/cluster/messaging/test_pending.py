"""Answers that are due come, fail, or are late, by a clock that the test turns."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from lingualinked.cluster.messaging.pending import Pending, PendingAnswers, result_of, results_of, settle
from lingualinked.errors import ClosedError, StepTimeoutError, WorkerDiedError

STEP, OTHER = ("step", 1, 0), ("step", 2, 0)


def due(deadline: float = 10.0, *, devices: str = "ab", model: int | None = 1, **arguments: Any) -> Pending:
    return Pending(
        devices=frozenset(devices),
        asked="a",
        answer=object,
        model=model,
        what="a step",
        timeout_s=10.0,
        deadline=deadline,
        **arguments,
    )


@pytest.fixture
def answers() -> PendingAnswers:
    return PendingAnswers()


def add(answers: PendingAnswers, key: tuple[str, int, int], pending: Pending) -> concurrent.futures.Future[object]:
    answers.add(key, pending)
    return pending.future


def test_an_answer_reaches_who_asked(answers: PendingAnswers) -> None:
    step, other = add(answers, STEP, due()), add(answers, OTHER, due())
    answers.complete(OTHER, "other")
    answers.complete(STEP, "step")
    assert (step.result(0), other.result(0)) == ("step", "other")
    assert not answers._pending


def test_an_answer_that_nobody_awaits_is_dropped(answers: PendingAnswers) -> None:
    answers.complete(STEP, "late")
    answers.fail(STEP, ValueError())
    answers.progress(STEP, 5, 0.0)


def test_what_is_late_fails_and_the_rest_waits_on(answers: PendingAnswers) -> None:
    step, other = add(answers, STEP, due(10.0)), add(answers, OTHER, due(20.0))
    assert answers.time_left(7.0) == 3.0
    answers.expire(9.9)
    assert not step.done()
    answers.expire(10.0)
    with pytest.raises(StepTimeoutError, match="a step got no answer within timeout_s=10"):
        step.result(0)
    assert not other.done()
    assert answers.time_left(25.0) == 0.0


def test_a_late_part_is_named(answers: PendingAnswers) -> None:
    step = add(answers, STEP, due(part_senders=("a", "b", "a")))
    answers.add_part(STEP, 1, "of b")
    answers.complete(STEP, "step")
    assert not step.done()
    answers.expire(10.0)
    with pytest.raises(StepTimeoutError, match="a step got its answer, but not what 'a' recorded, within timeout_s=10"):
        step.result(0)
    answers.add_part(STEP, 0, "of a")
    assert not answers._pending


def test_nothing_due_waits_for_nothing(answers: PendingAnswers) -> None:
    assert answers.time_left(0.0) is None
    answers.expire(1e9)


def test_progress_starts_the_time_anew(answers: PendingAnswers) -> None:
    told: list[int] = []
    future = add(answers, STEP, due(10.0, on_progress=told.append))
    answers.progress(STEP, 7, 8.0)
    answers.expire(17.9)
    assert told == [7]
    assert not future.done()
    answers.expire(18.0)
    assert future.done()


def test_a_dead_device_fails_what_needs_it(answers: PendingAnswers) -> None:
    step, other = add(answers, STEP, due(devices="ab")), add(answers, OTHER, due(devices="bc"))
    answers.fail_device("a", lambda: WorkerDiedError("a", "killed"))
    with pytest.raises(WorkerDiedError, match="'a' died"):
        step.result(0)
    assert not other.done()


def test_a_closed_model_fails_what_is_for_it(answers: PendingAnswers) -> None:
    step, other = add(answers, STEP, due(model=1)), add(answers, OTHER, due(model=2))
    answers.fail_model(1, lambda: ClosedError("closed"))
    with pytest.raises(ClosedError):
        step.result(0)
    assert not other.done()


def test_every_waiting_thread_gets_an_error_of_its_own(answers: PendingAnswers) -> None:
    futures = [add(answers, STEP, due()), add(answers, OTHER, due())]
    answers.fail_all(lambda: ClosedError("closed"))
    first, second = (future.exception(0) for future in futures)
    assert isinstance(first, ClosedError)
    assert first is not second


class Large:
    """What a frame holds, as a tensor would be."""


def test_an_error_that_is_raised_keeps_no_frame_alive() -> None:
    def fail() -> None:
        raise ClosedError("closed")

    def failed() -> Future[None]:
        future: Future[None] = Future()
        thread = threading.Thread(target=settle, args=(future, fail))
        thread.start()
        thread.join()
        return future

    def step(large: Large, wait: Callable[[], object]) -> None:
        wait()

    large = Large()
    held, was_enabled = weakref.ref(large), gc.isenabled()
    gc.disable()
    try:
        for wait in (lambda: result_of(failed()), lambda: results_of([failed(), failed()])):
            with contextlib.suppress(ClosedError):
                step(large, wait)
        del large
        assert held() is None
    finally:
        if was_enabled:
            gc.enable()


def test_results_come_in_order_and_the_first_error_ends_the_wait() -> None:
    done: list[Future[int]] = [Future(), Future()]
    done[1].set_result(2)
    done[0].set_result(1)
    assert results_of(done) == [1, 2]
    assert not done
    failed: Future[int] = Future()
    failed.set_exception(ClosedError("closed"))
    with pytest.raises(ClosedError):
        results_of([Future(), failed])

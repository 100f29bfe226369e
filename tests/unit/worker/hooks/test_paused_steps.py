"""A step that pauses computes only while the loop waits for it, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lingualinked.errors import ProtocolError
from lingualinked.worker.hooks.paused_steps import PausedSteps

KEY = (1, 2, 3)


@pytest.fixture
def steps() -> Iterator[PausedSteps]:
    made = PausedSteps()
    yield made
    if made._idle is not None:
        made._idle.end()


def test_a_step_pauses_and_goes_on(steps: PausedSteps) -> None:
    seen: list[Any] = []

    def run(pause: Callable[[], Any]) -> None:
        seen.append(threading.current_thread().name)
        seen.append(pause())
        seen.append(pause())

    steps.start_step(KEY, run)
    assert seen == ["lingualinked-step"]
    steps.resume_step(KEY, "first")
    steps.resume_step(KEY, "second")
    assert seen[1:] == ["first", "second"]
    with pytest.raises(ProtocolError, match="no step of session 3 waits"):
        steps.resume_step(KEY, "third")


def test_an_error_is_raised_in_the_loop(steps: PausedSteps) -> None:
    def run(pause: Callable[[], Any]) -> None:
        raise ValueError(pause())

    steps.start_step(KEY, run)
    with pytest.raises(ValueError, match="given"):
        steps.resume_step(KEY, "given")


def test_steps_of_a_session_or_a_model_are_abandoned_and_one_thread_stays(steps: PausedSteps) -> None:
    ended: list[int] = []

    def run(session: int) -> Callable[[Callable[[], Any]], None]:
        def wait(pause: Callable[[], Any]) -> None:
            try:
                pause()
            finally:
                ended.append(session)

        return wait

    before = threading.active_count()
    for session in range(4):
        steps.start_step((1, 2, session), run(session))
    steps.abandon_steps(1, 2)
    assert ended == [2]
    steps.abandon_steps(7)
    steps.abandon_steps(1)
    assert sorted(ended) == [0, 1, 2, 3]
    assert threading.active_count() == before + 1


def test_a_session_pauses_one_step_and_a_worker_so_many(steps: PausedSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingualinked.worker.hooks.paused_steps._MAX_PAUSED", 2)
    for session in range(2):
        steps.check_room((1, 2, session))
        steps.start_step((1, 2, session), lambda pause: pause())
    with pytest.raises(ProtocolError, match="of session 0, of which another one waits"):
        steps.check_room((1, 2, 0))
    with pytest.raises(ProtocolError, match="2 steps wait"):
        steps.check_room((1, 2, 7))
    steps.abandon_steps(1)
    steps.check_room((1, 2, 0))

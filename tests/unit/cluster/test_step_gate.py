"""Steps and changes of a model exclude each other, except in the thread that runs a step."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lingualinked.cluster.steps.step_gate import StepGate
from lingualinked.errors import StepTimeoutError


def test_a_change_waits_for_steps_and_steps_for_changes() -> None:
    gate, events = StepGate(), []
    is_running, may_end = threading.Event(), threading.Event()

    def step() -> None:
        with gate.step():
            is_running.set()
            may_end.wait(60)
            events.append("step")

    def change() -> None:
        with gate.change(60):
            events.append("change")

    with ThreadPoolExecutor(2) as pool:
        pool.submit(step)
        is_running.wait(60)
        changed = pool.submit(change)
        may_end.set()
        changed.result(60)
    assert events == ["step", "change"]


def test_a_hook_changes_its_own_model_and_calls_it_again() -> None:
    gate = StepGate()
    with gate.step(), gate.change(0.0), gate.step():
        pass
    with gate.change(0.0), gate.change(0.0):
        pass
    with gate.step():
        pass


def test_a_change_does_not_wait_for_ever() -> None:
    gate = StepGate()
    with gate.step(), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: gate.change(0.0).__enter__())
        with pytest.raises(StepTimeoutError, match="did not end within timeout_s=0"):
            waiting.result(60)
    with gate.step():  # no change is left that it would wait for
        pass

"""What an engine hands to the threads that ask, however quick the answer is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import Pending, PendingAnswers
from lingualinked.model.hooks.hook_data import HookPoint
from message_examples import STEP


class AtOnce:
    """An exchange whose steps have stopped at a hook before anybody can look."""

    def send_step(self, _devices: Any, step: Any, _tensors: Any, pending: Pending, _run: None) -> None:
        answers, key = PendingAnswers(), ("step", step.session, step.number)
        answers.add(key, pending)
        answers.pause(key, "mlp", "event", 0.0)


def test_a_step_that_stops_at_once_completes_the_future_that_its_caller_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = object.__new__(Engine)
    engine._exchange = AtOnce()
    monkeypatch.setattr(engine, "_post", lambda command: command(), raising=False)
    step = msgspec.structs.replace(STEP, hooks=(HookPoint("mlp", False, True),))
    event, rest = engine.step(["a"], step, (), 1.0).result(0)
    assert event == "event"
    assert not rest.done()

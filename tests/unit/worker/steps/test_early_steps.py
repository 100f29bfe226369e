"""Steps wait for what other stages make for them, however that arrives; nobody can fill a worker's memory with what never comes together."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.steps import ShortcutTensors, Step
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.worker.background import Background
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps import early_steps, received_shortcuts
from lingualinked.worker.steps.early_steps import EarlySteps
from unit.worker.stages.test_hosted_stage import PACE, STEP, PlainStage

IDS = torch.tensor([[5, 7]])


class Worker:
    """The last of three stages, which gets ids from the first one and an output from the second one."""

    def __init__(self) -> None:
        stage: Any = PlainStage()
        stage.used_shortcuts = ("input_ids", "layer 1")
        self.hosted = HostedStage(stage, "b", "caller", None, 3, shortcut_sources={0: "a", 1: "b"})
        self.stages = HostedStages("cpu", Background(lambda: None))
        self.stages._stages[StageKey(1, 1, 2)] = self.hosted
        self.served: list[tuple[int, int]] = []
        self.early = EarlySteps(self.stages, self.serve)

    def serve(self, step: Step, delivery: Delivery) -> None:
        self.served.append((step.session, step.number))
        self.hosted.run_step(step, delivery.tensors, PACE)

    def step(self, session: int, number: int = 0) -> None:
        step = msgspec.structs.replace(STEP, stage=2, session=session, number=number)
        states = torch.zeros(1, 2, 4)
        delivery = Delivery("b", b"", (states,), num_bytes=states.nbytes, decode_s=0.0, due_s=0.0, same_host=True)
        self.early.receive(step, delivery)

    def shortcut(self, source: int, session: int, number: int = 0, **given: Tensor) -> None:
        names = {"ids": "input_ids", "output": "layer 1"}
        message = ShortcutTensors(
            model=1,
            plan_version=1,
            stage=2,
            source=source,
            session=session,
            number=number,
            names=tuple(names.get(name, name) for name in given),
        )
        self.early.receive_shortcuts(message, tuple(given.values()))

    def complete(self, session: int, number: int = 0) -> None:
        self.shortcut(0, session, number, ids=IDS)
        self.shortcut(1, session, number, output=torch.ones(1, 2, 4))


def test_steps_run_in_order_whatever_comes_first() -> None:
    worker = Worker()
    worker.step(1)
    worker.step(1, 1)
    worker.shortcut(0, 1, ids=IDS)
    worker.complete(1, 1)
    assert worker.served == []
    worker.complete(2)
    worker.step(2)
    worker.shortcut(1, 1)
    assert worker.served == [(2, 0), (1, 0), (1, 1)]


def test_a_move_that_begins_or_ends_leaves_steps_that_wait_for_tensors() -> None:
    worker = Worker()
    worker.step(1)
    assert list(worker.early.remove_lost(1)) == []
    worker.complete(1)
    assert worker.served == [(1, 0)]
    worker.step(1, 1)
    worker.hosted.sessions.clear()
    worker.hosted.arriving.write_kv(1, [])
    assert [step.number for step, _ in worker.early.remove_lost(1)] == [1]
    worker.step(3)
    worker.stages.unload_model(1)
    assert [step.session for step, _ in worker.early.remove_lost(1)] == [3]
    assert worker.early._num_bytes == worker.early._num_steps == 0


@pytest.mark.parametrize(
    "given",
    [
        {"model.norm": IDS},
        {"output": IDS, "ids": IDS},
        {"ids": IDS, "extra": IDS},
    ],
    ids=["another name", "what another stage has sent", "one too many"],
)
def test_what_is_not_due_is_refused(given: dict[str, Tensor]) -> None:
    worker = Worker()
    worker.shortcut(0, 1, ids=IDS)
    with pytest.raises(ProtocolError, match="are due"):
        worker.shortcut(1, 1, **given)
    with pytest.raises(ProtocolError, match="once too often"):
        worker.shortcut(0, 1)
    worker.shortcut(1, 1, output=IDS)
    assert worker.hosted.shortcuts.remove(1, 0).keys() == {"input_ids", "layer 1"}


def test_a_name_given_twice_is_refused_and_counts_nothing() -> None:
    worker = Worker()
    message = ShortcutTensors(
        model=1, plan_version=1, stage=2, source=0, session=1, number=0, names=("input_ids", "input_ids")
    )
    with pytest.raises(ProtocolError, match="arrived for"):
        worker.early.receive_shortcuts(message, (IDS, IDS))
    assert worker.hosted.shortcuts._num_bytes == 0


def test_what_comes_after_the_end_of_its_session_is_not_kept() -> None:
    """The end takes another way than tensors do, and may be quicker; so may a step be that its sender had on its way."""
    worker = Worker()
    for session in range(500):
        worker.complete(session)
        worker.step(session)
        worker.shortcut(0, session, 1, ids=IDS)
        worker.stages.end_session(1, session, 1)
        worker.early.drop_session(1, 1, session)
        worker.complete(session, 1)
        with pytest.raises(ProtocolError, match="no state here"):
            worker.step(session, 1)
    assert not worker.hosted.shortcuts._held
    assert not worker.early._waiting
    assert worker.hosted.shortcuts._num_bytes == worker.early._num_bytes == 0


def test_tensors_and_steps_that_never_come_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (early_steps, received_shortcuts):
        monkeypatch.setattr(module, "_MOST_STEPS", 10)
    worker = Worker()
    for session in range(100):
        worker.shortcut(0, session)
    assert len(worker.hosted.shortcuts._held) == 10
    for session in range(100, 110):
        worker.step(session)
    with pytest.raises(ProtocolError, match="too many"):
        worker.step(200)
    for session in range(100):
        worker.stages.end_session(1, session, 1)
    assert not worker.hosted.shortcuts._held

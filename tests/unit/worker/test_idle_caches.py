"""Memory and graphs of a static KV cache serve the next session of its shape, within the budget."""

from __future__ import annotations

import weakref
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from conversations import dummy_spec, prompt
from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.stages.stage import Stage
from lingualinked.protocol.messages import LoadStage
from lingualinked.protocol.moving import ForkSession
from lingualinked.protocol.steps import Step
from lingualinked.worker.background import Background
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps.pace import Pace
from texts_on_a_stage import hold_nothing, no_collector

ROOM = 32
PACE = Pace(1, 1.0)


@pytest.fixture(scope="module")
def stage() -> Stage:
    stage = Stage.load(dummy_spec("llama", "bfloat16"), 0, 4)
    stage.graphs.record = lambda body: body
    return stage


@pytest.fixture
def hosted(stage: Stage) -> HostedStage:
    stage.graphs.idle.clear()
    stage.graphs.num_replayed = 0
    return HostedStage(stage, "before", "after", max_kv_tokens=4 * ROOM)


def talk(hosted: HostedStage, session: int, *, rows: int = 1, room: int = ROOM, steps: int = 8) -> list[Tensor]:
    """Decode greedily in a new session, which stays open."""
    step = Step(
        model=1, plan_version=1, stage=0, session=session, number=0, keeps_kv=True, layout=None, mask=MaskMode.NONE,
        positions=PositionMode.NONE, position_rows=0, logits_to_keep=1, edits=(), rope_reach=0, sent_us=0, timings=(),
        max_cache_len=room,
    )  # fmt: skip
    tokens, logits = prompt(rows, 9), []
    for number in range(steps):
        output, _ = hosted.run_step(msgspec.structs.replace(step, number=number), (tokens,), PACE)
        logits.append(output.tensors[0].clone())
        tokens = logits[-1][:, -1:].argmax(-1)
    return logits


def test_the_next_session_of_a_shape_replays_from_its_first_decode_step_on(hosted: HostedStage) -> None:
    first = talk(hosted, 1)
    hosted.end_session(1)
    held_bytes = hosted.held_bytes
    assert hosted.snapshot().kv_bytes == 0
    hosted.stage.graphs.num_replayed = 0
    assert all(map(torch.equal, talk(hosted, 2), first))
    assert hosted.stage.graphs.num_replayed == 7
    assert hosted.held_bytes == held_bytes
    assert not hosted.stage.graphs.idle


@pytest.mark.parametrize("shape", [{"rows": 2}, {"room": 31}, {"room": 0}], ids=str)
def test_a_session_of_another_shape_gets_memory_of_its_own(hosted: HostedStage, shape: dict[str, Any]) -> None:
    talk(hosted, 1)
    hosted.end_session(1)
    (idle,) = hosted.stage.graphs.idle
    talk(hosted, 2, **shape)
    assert hosted.stage.graphs.idle == [idle]


def test_a_cache_without_graphs_is_freed(hosted: HostedStage) -> None:
    talk(hosted, 1, steps=1)
    talk(hosted, 2, room=0)
    for session in (1, 2):
        hosted.end_session(session)
    assert not hosted.stage.graphs.idle


def test_idle_caches_take_nothing_from_the_budget(hosted: HostedStage) -> None:
    for session in range(4):
        talk(hosted, session)
    with pytest.raises(ProtocolError, match="max_kv_tokens"):
        talk(hosted, 4)
    for session in range(4):
        hosted.end_session(session)
    assert len(hosted.stage.graphs.idle) == 4
    talk(hosted, 5, rows=3)  # no room beside four idle ones
    assert not hosted.stage.graphs.idle
    talk(hosted, 6)
    hosted.end_session(6)
    assert len(hosted.stage.graphs.idle) == 1
    hosted.end_session(5)  # three rows beside one
    assert len(hosted.stage.graphs.idle) == 2


def test_idle_caches_make_room_in_memory(hosted: HostedStage, monkeypatch: pytest.MonkeyPatch) -> None:
    talk(hosted, 1)
    hosted.end_session(1)
    monkeypatch.setattr("lingualinked.worker.stages.hosted_stage.spare_bytes", lambda _accelerator: 100)
    talk(hosted, 2, rows=2)
    assert not hosted.stage.graphs.idle


@pytest.fixture
def stages(stage: Stage, hosted: HostedStage) -> HostedStages:
    """Two models on one worker, each with an idle KV cache."""
    stages = HostedStages("cpu", Background(lambda: None))
    other = Stage.load(dummy_spec("llama", "bfloat16"), 0, 4, shared=[stage])
    other.graphs.record = lambda body: body
    for model, each in ((1, hosted), (2, HostedStage(other, "before", "after", max_kv_tokens=None))):
        stages._stages[StageKey(model, 1, 0)] = each
        talk(each, 1)
        each.end_session(1)
        assert len(each.stage.graphs.idle) == 1
    return stages


def idle_caches(stages: HostedStages) -> list[int]:
    return [len(each.stage.graphs.idle) for each in stages._stages.values()]


def test_idle_caches_leave_as_much_memory_as_they_take(stages: HostedStages, monkeypatch: pytest.MonkeyPatch) -> None:
    spare = 10**9
    monkeypatch.setattr("lingualinked.worker.stages.hosted_stages.spare_bytes", lambda _accelerator: spare)
    other = stages._stages[StageKey(2, 1, 0)]
    (small,) = other.stage.graphs.idle
    num_bytes = small.nbytes
    for length in (2, 3):  # texts that become longer and longer, whose caches nothing will fit again
        talk(other, length, room=length * ROOM)
        stages.end_session(2, length, 1)
    assert idle_caches(stages) == [1, 3]
    spare = 6 * num_bytes
    stages.trim_idle_caches()
    assert idle_caches(stages) == [1, 2]
    spare = 5 * num_bytes
    stages.end_session(1, 99, 1)  # whatever ends, of any model
    assert idle_caches(stages) == [1, 1]
    assert other.stage.graphs.idle[0].max_cache_len == 3 * ROOM
    spare = 0
    talk(other, 4)
    stages.make_session(ForkSession(request=1, model=2, plan_version=1, stage=0, session=4, number=8, fork=5))
    assert idle_caches(stages) == [0, 0]


def test_what_is_to_be_loaded_gets_the_memory_of_idle_caches(stages: HostedStages) -> None:
    load = LoadStage(
        request=1, model=3, plan_version=1, stage=0, spec=dummy_spec("llama", "bfloat16"), start=0, end=1,
        previous_name="a", next_name="b", max_kv_tokens=None, num_stages=1, holders=(), supplies=(),
    )  # fmt: skip
    stages._background.submit = lambda _work: None  # type: ignore[method-assign]
    stages.load_stage(load, *[lambda *_: None] * 4)
    assert idle_caches(stages) == [0, 0]


def test_a_stage_that_a_session_leaves_keeps_no_memory_of_it(stages: HostedStages) -> None:
    hosted = stages._stages[StageKey(1, 1, 0)]
    hosted.stage.graphs.idle.clear()
    talk(hosted, 7)
    stages.move_session(1, 7, 2)
    assert 7 not in hosted.sessions
    assert not hosted.stage.graphs.idle


def test_memory_given_up_to_the_budget_is_freed_at_once(hosted: HostedStage) -> None:
    hosted.stage.graphs.record = hold_nothing
    try:
        talk(hosted, 1)
        keys = weakref.ref(hosted.sessions[1].cache.owned[0].keys)  # type: ignore[union-attr, arg-type]
        hosted.end_session(1)
        with no_collector():
            talk(hosted, 2, rows=4, steps=1)
            assert keys() is None
    finally:
        hosted.stage.graphs.record = lambda body: body

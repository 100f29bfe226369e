"""Memory and graphs of a static KV cache serve the next session of its shape, within the budget."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from conversations import dummy_spec, prompt
from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.stage import Stage
from lingualinked.protocol.messages import Step
from lingualinked.worker.hosted_stage import HostedStage
from lingualinked.worker.pace import Pace

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
    monkeypatch.setattr("lingualinked.worker.hosted_stage.spare_bytes", lambda _accelerator: 100)
    talk(hosted, 2, rows=2)
    assert not hosted.stage.graphs.idle

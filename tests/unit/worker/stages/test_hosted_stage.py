"""Steps and KV from other workers can't make a stage exceed its bounds, and a repeated step changes nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaConfig

from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.stages.stage_data import StageInputs, StageOutput
from lingualinked.model.stages.step_graphs import StepGraphs
from lingualinked.protocol.moving import KVSlice
from lingualinked.protocol.steps import KVEdit, KVEditKind, Step
from lingualinked.worker.background import Background
from lingualinked.worker.kv.kv_copy import KVCopy, Piece
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps.pace import Pace

CONFIG = LlamaConfig(num_hidden_layers=2)
PACE = Pace(1, 1.0)


class PlainStage:
    """Keeps KV and computes nothing."""

    start, end, weight_bytes, device = 0, 2, 0, torch.device("cpu")

    def __init__(self) -> None:
        self.graphs = StepGraphs(self.device, None)

    def new_cache(self, spare_bytes: Callable[[], float] = lambda: math.inf, max_cache_len: int = 0) -> StageCache:
        return StageCache(CONFIG, {0, 1}, spare_bytes, max_cache_len)

    def step_shape(self, states: torch.Tensor, _shape: tuple[int, int] | None = None) -> tuple[int, int]:
        return states.shape[0], states.shape[1]

    @torch.inference_mode()
    def step(self, inputs: StageInputs, cache: StageCache | None) -> StageOutput:
        rows, tokens = inputs.tensors[0].shape[:2]
        if cache is not None:
            cache.count.begin_step(tokens)
            for layer in cache.owned.values():
                states = torch.zeros(rows, 2, tokens, 4)
                layer.update(states, states)
            cache.advance(tokens)
        return StageOutput(tensors=inputs.tensors, layout=None)


def hosted_stage(max_kv_tokens: int | None = None) -> HostedStage:
    stage: Any = PlainStage()
    return HostedStage(stage, "before", "after", max_kv_tokens)


STEP = Step(
    model=1,
    plan_version=1,
    stage=0,
    session=1,
    number=0,
    keeps_kv=True,
    layout=None,
    mask=MaskMode.NONE,
    positions=PositionMode.NONE,
    position_rows=0,
    logits_to_keep=1,
    edits=(),
    rope_reach=0,
    sent_us=0,
    timings=(),
)


def run(hosted: HostedStage, rows: int, tokens: int, **fields: Any) -> None:
    hosted.run_step(msgspec.structs.replace(STEP, **fields), (torch.zeros(rows, tokens, dtype=torch.long),), PACE)


def order(*rows: int) -> KVEdit:
    return KVEdit(kind=KVEditKind.REORDER, values=rows)


def crop(num_tokens: int) -> KVEdit:
    return KVEdit(kind=KVEditKind.CROP, values=(num_tokens,))


def test_orders_of_rows_come_to_one() -> None:
    hosted = hosted_stage()
    run(hosted, 2, 3)
    run(hosted, 3, 1, number=1, edits=(order(0, 1, 0, 1, 0, 1), crop(1), order(5, 0, 0)))
    cache = hosted.sessions[1].cache
    assert cache is not None
    assert {layer.num_rows for layer in cache.owned.values()} == {3}
    assert cache.num_tokens == 3


@pytest.mark.parametrize(
    "edits",
    [
        (order(*[0] * 200_000),),
        (order(0), order(*[0] * 200_000)),
        (order(0, 1), order(0, 2)),
        (order(0, 2),),
        (order(0, -1),),
        (order(),),
        (KVEdit(kind=KVEditKind.CROP, values=()),),
        (crop(4),),
        (crop(2), crop(2)),
        (KVEdit(kind=KVEditKind.RECORD, values=(1, 1)),),
    ],
    ids=[
        "many",
        "many at last",
        "beyond the one before",
        "beyond what is held",
        "negative",
        "none",
        "no crop",
        "crop of more",
        "crops of more",
        "two records",
    ],
)
def test_edits_that_fit_no_step_are_refused(edits: tuple[KVEdit, ...]) -> None:
    hosted = hosted_stage()
    run(hosted, 2, 3)
    with pytest.raises((ProtocolError, IndexError)):
        run(hosted, 2, 1, number=1, edits=edits)
    assert not hosted.sessions


def test_positions_of_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(ProtocolError, match="positions"):
        run(hosted_stage(), 2, 3, positions=PositionMode.RANGE, position_rows=10**9)


@pytest.mark.parametrize(("rows", "tokens"), [(0, 1), (1, 0)])
def test_steps_of_nothing_begin_no_sessions(rows: int, tokens: int) -> None:
    """They would not count against the budget, however many there are."""
    hosted = hosted_stage(max_kv_tokens=10)
    with pytest.raises(ProtocolError, match="at least one of each"):
        run(hosted, rows, tokens)
    assert not hosted.sessions


def test_sessions_beyond_the_budget_are_refused_and_the_others_go_on() -> None:
    hosted = hosted_stage(max_kv_tokens=10)
    run(hosted, 2, 3, session=1)
    for session in range(2, 1_000):
        with pytest.raises(ProtocolError, match="max_kv_tokens=10"):
            run(hosted, 1, 5, session=session)
    assert list(hosted.sessions) == [1]
    run(hosted, 1, 500, session=2, keeps_kv=False)  # which holds none
    run(hosted, 2, 2, session=1, number=1)
    hosted.end_session(1)
    run(hosted, 1, 10, session=3)


def test_a_static_session_counts_all_of_its_length() -> None:
    hosted = hosted_stage(max_kv_tokens=40)
    with pytest.raises(ProtocolError, match="42 tokens in all rows exceeds max_kv_tokens=40"):
        run(hosted, 2, 3, max_cache_len=21)
    assert not hosted.sessions
    run(hosted, 2, 3, max_cache_len=19)
    run(hosted, 2, 3, max_cache_len=19, number=1)
    with pytest.raises(ProtocolError, match="max_kv_tokens=40"):
        run(hosted, 1, 3, session=2)
    run(hosted, 1, 2, session=2)


def test_rows_beyond_the_budget_are_refused_before_there_is_room_for_them() -> None:
    hosted = hosted_stage(max_kv_tokens=1_000)
    run(hosted, 1, 900)
    session, reordered = hosted.sessions[1], []
    assert session.cache is not None
    session.cache.reorder = reordered.append  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match="max_kv_tokens=1000"):
        run(hosted, 500, 1, number=1, edits=(order(*[0] * 500),))
    assert not reordered


def piece(rows: tuple[int, ...] | None, num_rows: int, tokens: int, *, position: int = 0, capacity: int = 64) -> Piece:
    states = torch.zeros(num_rows, 2, tokens, 4)
    place = KVSlice(slot=0, first=0, position=position, capacity=capacity, rows=rows)
    return Piece(place=place, keys=states, values=states)


def test_a_stage_out_of_service_is_freed_at_once_and_not_by_the_collector() -> None:
    hosted = hosted_stage()
    hosted.arriving.write_kv(1, [piece(None, 2, 3)])
    freed: list[weakref.ref[Any]] = [weakref.ref(hosted), weakref.ref(hosted.stage)]
    del hosted
    assert [each() for each in freed] == [None, None]


def test_an_order_of_more_rows_than_are_held_is_refused() -> None:
    hosted = hosted_stage()
    hosted.arriving.write_kv(1, [piece(None, 2, 3)])
    for wrong in (
        piece((0,) * 100_000, 1, 0, position=3),
        piece((0,) * 100_000, 100_000, 0, position=3),
        piece((0, 1, 0), 3, 1, position=3),
        piece((0, 2), 2, 1, position=3),
        piece((-1, 0), 2, 1, position=3),
    ):
        with pytest.raises(ProtocolError, match="order of"):
            hosted.arriving.write_kv(1, [wrong])
    hosted.arriving.write_kv(1, [piece((1, 0), 2, 1, position=3)])


def test_keys_and_values_are_of_the_same_tokens() -> None:
    good = piece(None, 2, 3)
    with pytest.raises(ProtocolError, match="different tokens"):
        hosted_stage().arriving.write_kv(1, [Piece(good.place, good.keys, good.values[:1])])


def test_kv_from_elsewhere_counts_too() -> None:
    hosted = hosted_stage(max_kv_tokens=10)
    with pytest.raises(ProtocolError, match="max_kv_tokens=10"):
        hosted.arriving.write_kv(1, [piece(None, 4, 3)])
    hosted.arriving.write_kv(1, [piece(None, 2, 5, capacity=10**9)])  # room is made for what it may hold
    hosted.arriving.write_kv(2, [piece(None, 1, 10)])
    with pytest.raises(ProtocolError, match="max_kv_tokens=10"):  # more than fits beside the others
        hosted.arriving.write_kv(3, [piece(None, 1, 2)])
    hosted.end_session(2)
    hosted.arriving.write_kv(3, [piece(None, 1, 10)])
    arriving = hosted.arriving.sessions[1].cache
    assert arriving is not None
    assert arriving.owned[0].capacity <= 64


def test_kv_from_elsewhere_knows_its_length() -> None:
    hosted = hosted_stage(max_kv_tokens=40)
    with pytest.raises(ProtocolError, match="42 tokens in all rows exceeds max_kv_tokens=40"):
        hosted.arriving.write_kv(1, [piece(None, 2, 3)], 21)
    hosted.end_session(1)
    hosted.arriving.write_kv(1, [piece(None, 2, 3)], 20)
    with pytest.raises(ProtocolError, match="max_cache_len=0, and before for one of 20"):
        hosted.arriving.write_kv(1, [piece(None, 2, 3, position=3)])
    arriving = hosted.arriving.sessions[1].cache
    assert arriving is not None
    assert (arriving.max_cache_len, arriving.owned[0].capacity, arriving.owned[0].stop) == (20, 20, 3)


def test_where_rows_become_more_all_is_sent_anew() -> None:
    cache = PlainStage().new_cache()
    states = torch.arange(2 * 2 * 3 * 4, dtype=torch.float32).view(2, 2, 3, 4)
    for layer in cache.owned.values():
        layer.update(states, states)
    cache.advance(3)
    copy, receiver = KVCopy(cache, [0, 1]), hosted_stage()
    receiver.arriving.write_kv(1, copy.next_pieces(1 << 20)[0])
    rows = torch.tensor([1, 0, 1])
    cache.reorder(rows)
    copy.record_reorder(rows)
    pieces, is_last = copy.next_pieces(1 << 20)
    assert is_last
    assert [each.place.rows for each in pieces] == [None, None]
    receiver.arriving.write_kv(1, pieces)
    arrived = receiver.arriving.sessions[1].cache
    assert arrived is not None
    for slot, layer in cache.owned.items():
        assert torch.equal(arrived.owned[slot].read_tokens(0, 3)[0], layer.read_tokens(0, 3)[0])


@pytest.fixture
def stages() -> HostedStages:
    """Two versions of a plan; session 1 is under the second one."""
    stages = HostedStages("cpu", Background(lambda: None))
    for version in (1, 2):
        stages._stages[StageKey(1, version, 0)] = hosted_stage()
    run(stages._stages[StageKey(1, 2, 0)], 2, 3)
    return stages


def test_a_step_that_has_run_is_not_run_again(stages: HostedStages) -> None:
    with pytest.raises(ProtocolError, match="step 0 of session 1 arrived, and 1 is due"):
        stages.is_due(StageKey(1, 2, 0), 1, 0)
    assert stages.is_due(StageKey(1, 2, 0), 1, 1)


def test_a_step_of_another_version_waits_for_word_of_the_move(stages: HostedStages) -> None:
    key = StageKey(1, 1, 0)
    assert not stages.is_due(key, 1, 1)
    with pytest.raises(ProtocolError, match="runs under another plan version"):
        stages.is_due(key, 1, 0)
    stages.move_session(1, 1, 1)
    assert stages.is_due(key, 1, 1)


def test_the_end_of_a_session_that_has_moved_on_is_none(stages: HostedStages) -> None:
    stages.end_session(1, 1, 1)
    assert 1 in stages._stages[StageKey(1, 2, 0)].sessions
    stages.end_session(1, 1, 2)
    assert 1 not in stages._stages[StageKey(1, 2, 0)].sessions

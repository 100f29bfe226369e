"""Edits reach all who hold a tensor, or none; and the stages of a route that layers move to."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.cluster.weights.tensor_edits import Change, TensorEdits
from lingualinked.errors import WorkerError
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.planning.plan import Plan
from lingualinked.protocol.editing import ChangeKind, EditTensor
from lingualinked.weight_bytes import WeightBytes

PARTS = ModelParts(
    layers="model.layers",
    num_layers=3,
    prologue=("model.embed_tokens",),
    epilogue=("model.norm", "lm_head"),
    weights=WeightBytes(layers=(1, 1, 1), prologue=1, epilogue=1),
)
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
LAYER, ROTARY = "model.layers.1.mlp.weight", "model.rotary_emb.inv_freq"
TIED = {EMBEDDINGS: (EMBEDDINGS, HEAD)}


class FakeEngine:
    """Records what workers are sent; those in `broken` refuse."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, tuple[int, ...], int]] = []
        self.broken: set[str] = set()

    def next_request(self) -> int:
        return 0

    def request(
        self, device: str, message: EditTensor, what: str, _: float, tensors: tuple[Tensor, ...]
    ) -> Future[object]:
        assert len(tensors) == len(message.new)
        self.sent.append((device, message.name, message.numbers, len(message.new)))
        future: Future[object] = Future()
        if device in self.broken:
            future.set_exception(WorkerError(device, what))
        else:
            future.set_result(None)
        return future

    def take(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        sent, self.sent = self.sent, []
        return sent


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def edits(engine: Any) -> TensorEdits:
    plan = Plan.from_spans([("a", 0, 1), ("b", 1, 2), ("c", 2, 3)])
    return TensorEdits(engine, 1, Routes(Route(1, plan)), 1.0)


def change(edits: TensorEdits) -> Change:
    return Change(edits.new_number(), ChangeKind.ADD, (torch.ones(1),))


def replace(edits: TensorEdits, name: str, *changes: Change) -> None:
    with edits.between_steps():
        edits.replace(PARTS, {name: changes}, TIED)


@pytest.mark.parametrize(
    ("name", "devices"), [(LAYER, ["b"]), (HEAD, ["c"]), (EMBEDDINGS, ["a", "c"]), (ROTARY, ["a", "b", "c"])]
)
def test_who_holds_a_tensor_is_told(edits: TensorEdits, engine: FakeEngine, name: str, devices: list[str]) -> None:
    replace(edits, name, change(edits))
    assert engine.take() == [(device, name, (0,), 1) for device in devices]
    assert edits.revision == 1


def test_only_new_changes_are_sent(edits: TensorEdits, engine: FakeEngine) -> None:
    first, second = change(edits), change(edits)
    replace(edits, LAYER, first)
    replace(edits, LAYER, first, second)
    replace(edits, LAYER, second)
    assert engine.take() == [("b", LAYER, (0,), 1), ("b", LAYER, (0, 1), 1), ("b", LAYER, (1,), 0)]
    assert edits.list_changes() == [(LAYER, second)]


def test_an_edit_that_fails_anywhere_is_undone_everywhere(edits: TensorEdits, engine: FakeEngine) -> None:
    first = change(edits)
    replace(edits, EMBEDDINGS, first)
    engine.take()
    engine.broken = {"c"}
    with pytest.raises(WorkerError):
        replace(edits, EMBEDDINGS, first, change(edits))
    assert engine.take()[2:] == [("a", EMBEDDINGS, (0,), 1), ("c", EMBEDDINGS, (0,), 1)]
    assert edits.in_force(EMBEDDINGS) == (first,)
    assert edits.revision == 1


def test_new_stages_get_what_their_workers_do_not_hold_yet(edits: TensorEdits, engine: FakeEngine) -> None:
    for name in (LAYER, EMBEDDINGS):
        replace(edits, name, change(edits))
    engine.take()
    target = Route(2, Plan.from_spans([("a", 0, 2), ("d", 2, 3)]))
    with edits.loading(target):
        assert engine.take() == []
    assert engine.take() == [("a", LAYER, (0,), 1), ("d", EMBEDDINGS, (1,), 1)]
    replace(edits, LAYER)
    assert [device for device, *_ in engine.take()] == ["a", "b"]
    edits.end_move()
    replace(edits, LAYER, change(edits))
    assert [device for device, *_ in engine.take()] == ["b"]

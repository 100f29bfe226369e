"""Captures and interventions that arrive in a worker are checked before a module is touched."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.model.cutting.cut import StandIn
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.model.hooks.instrument_data import Capture, Change, Choice, Instruments
from lingualinked.model.hooks.instruments import InstrumentedPass, StageInstruments
from lingualinked.weight_bytes import WeightBytes

WEIGHTS = WeightBytes(layers=(1, 1), prologue=0, epilogue=0, tied=0)
PARTS = ModelParts(layers="layers", num_layers=2, prologue=(), epilogue=(), weights=WEIGHTS)


class Model(nn.Module):
    """A stage of the first of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), StandIn()])


def capture(path: str = "layers.0", **fields: Any) -> Capture:
    item = Capture(path, "output", Choice(), Choice(), "all", None, None)
    return msgspec.structs.replace(item, **fields)


def change(kind: str, tensors: tuple[int, ...] = (), numbers: tuple[float | None, ...] = ()) -> Change:
    return Change("layers.0", "output", Choice(), Choice(), "all", kind, tensors, numbers)  # type: ignore[arg-type]


def placed(model: nn.Module, *items: Any, tensors: tuple[Tensor, ...] = ()) -> StageInstruments:
    return StageInstruments(model, PARTS, Instruments(items, len(tensors)), tensors, is_first=True, is_last=False)


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        (capture("layers.0.mlp"), "no module 'layers.0.mlp'"),
        (capture("training"), "no module 'training'"),
        (change("add", (1,)), "not among 1"),
        (change("add"), "0 tensors"),
        (change("replace", (0,), (1.0,)), "1 tensor and 1 number"),
        (change("scale", (0,), (2.0,)), "1 tensor and 1 number"),
        (change("scale", (), (None,)), "1 number"),
        (change("remove", (0, 0)), "2 tensors"),
        (change("clamp", (), (None, None)), "2 numbers"),
        (change("clamp", (), (1.0,)), "1 number"),
    ],
)
def test_what_fits_no_module_and_no_tensor_is_refused(item: Any, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        placed(Model(), item, tensors=(torch.zeros(2),))


@pytest.mark.parametrize("field", ["kind", "side", "steps"])
def test_unknown_words_are_refused_as_messages(field: str) -> None:
    encoded = msgspec.msgpack.encode(msgspec.structs.replace(change("add", (0,)), **{field: "exec"}))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encoded, type=Capture | Change)
    for fields in ({"dtype": "int64"}, {"reduction": "pickle"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(capture(**fields)), type=Capture | Change)


def test_what_is_at_other_stages_is_left_to_them() -> None:
    model = Model()
    assert placed(model, capture("layers.1")).places == []
    assert placed(model, capture("layers.1.mlp")).places == []


def test_a_pass_leaves_no_hooks_and_counts_in_its_own_thread_alone() -> None:
    model = Model()
    instruments = placed(model, change("add", (0,)), capture(), tensors=(torch.ones(()),))
    values = torch.zeros(1, 2, 3)
    with InstrumentedPass(instruments, 1, 2, 0, captures=True) as done:
        assert torch.equal(model.layers[0](values), values + 1)
        done._thread += 1  # as for another thread, whose pass runs through the same module
        assert model.layers[0](values) is values
    assert [number for number, _ in done.captured] == [1]
    assert model.layers[0](values) is values
    assert not model.layers[0]._forward_hooks


def test_a_value_without_rows_and_positions_is_refused() -> None:
    model = Model()
    instruments = placed(model, capture(positions=Choice((-1, None, None))))
    with (
        InstrumentedPass(instruments, 2, 3, 0, captures=True),
        pytest.raises(ArgumentError, match=r"\[6, 4\], and not \[rows"),
    ):
        model.layers[0](torch.zeros(6, 4))

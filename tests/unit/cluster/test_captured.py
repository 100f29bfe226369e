"""What stages say that they captured is checked: by number, device, shape and dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.steps.captured import ExpectedValue, join_captured
from lingualinked.cluster.steps.recorded import RecordedPart
from lingualinked.errors import WorkerError
from lingualinked.planning.plan import Plan
from lingualinked.protocol.steps import StepRecorded

ROUTE = Route(1, Plan.from_spans([("a", 0, 2), ("b", 2, 4)]))


def expected(layer: int, **fields: Any) -> ExpectedValue:
    value = ExpectedValue(
        path=f"layers.{layer}",
        layer=layer,
        dtype=None,
        is_floating_point=True,
        shape=(2, 1, None),
        is_called_once=True,
    )
    return dataclasses.replace(value, **fields)


DUE = {0: expected(1), 1: expected(2), 3: expected(3, shape=None, is_called_once=False)}
VALUE = torch.zeros(2, 1, 8)


def part(*numbers: int, tensors: Any = None) -> RecordedPart:
    return RecordedPart((), (), numbers, (VALUE,) * len(numbers) if tensors is None else tensors)


def test_values_come_with_the_device_of_their_stage() -> None:
    values = join_captured(DUE, {0: part(0), 1: part(1, 3, 3)}, ROUTE, session=7)
    assert [(value.number, value.device, value.session) for value in values] == [
        (0, "a", 7),
        (1, "b", 7),
        (3, "b", 7),
        (3, "b", 7),
    ]
    assert len(join_captured(DUE, {0: part(0), 1: part(3)}, ROUTE, 7, skipped=(2,))) == 2


@pytest.mark.parametrize(
    ("parts", "device", "complaint"),
    [
        ({0: part(0)}, "b", "announced"),
        ({0: part(0), 1: part(3)}, "b", "0 values of layers.2"),
        ({0: part(0, 0), 1: part(1)}, "a", "2 values of layers.1"),
        ({0: part(0, 1), 1: part(1)}, "a", "not asked for"),
        ({0: part(0, 9), 1: part(1)}, "a", "not asked for"),
        ({0: part(0, tensors=()), 1: part(1)}, "a", "announced"),
        ({0: part(0, tensors=(VALUE[0],)), 1: part(1)}, "a", r"\[1, 8\] of layers.1"),
        ({0: part(0, tensors=(VALUE[:1],)), 1: part(1)}, "a", "of layers.1"),
        ({0: part(0, tensors=(VALUE.long(),)), 1: part(1)}, "a", "int64"),
        ({0: part(0, tensors=(VALUE.to(torch.float8_e5m2),)), 1: part(1)}, "a", "float8"),
    ],
)
def test_what_was_not_due_names_the_device(parts: dict[int, object], device: str, complaint: str) -> None:
    with pytest.raises(WorkerError, match=complaint) as raised:
        join_captured(DUE, parts, ROUTE, session=7)
    assert raised.value.device == device


def test_an_asked_dtype_counts() -> None:
    due = {0: expected(1, dtype=torch.float64)}
    with pytest.raises(WorkerError, match="float64"):
        join_captured(due, {0: part(0), 1: part()}, ROUTE, session=7)


@pytest.mark.parametrize(
    ("tensors", "num_values"), [((torch.ones(3, 2), torch.ones(2, 2, 1)), 2), ((torch.ones(()),), 0), ((), 0)]
)
def test_values_that_are_alike_come_as_one_tensor(tensors: tuple[torch.Tensor, ...], num_values: int) -> None:
    message = StepRecorded(model=1, session=1, number=0, stage=0, layouts=(), captured=(4, 2), is_stacked=True)
    came = RecordedPart.of(message, tensors)
    assert [list(each.shape) for each in came.captured_tensors] == [[2, 1]] * num_values
    assert len(came.tensors) == max(0, len(tensors) - 1)

"""Interventions are checked where they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lingualinked as ll


@pytest.mark.parametrize(
    "make",
    [
        lambda: ll.Add([1.0]),
        lambda: ll.Add(torch.zeros(0)),
        lambda: ll.Replace(torch.zeros(2, dtype=torch.complex64)),
        lambda: ll.Scale("2"),
        lambda: ll.Scale(True),
        lambda: ll.Ablate(0.0),
        lambda: ll.Project(torch.zeros(3)),
        lambda: ll.Project(torch.ones(2, 3)),
        lambda: ll.Project(torch.full((3,), torch.nan)),
        lambda: ll.Project(torch.eye(3), "drop"),
        lambda: ll.Project(torch.ones(1, 1, 3)),
        ll.Clamp,
        lambda: ll.Clamp(1, 0),
        lambda: ll.Clamp(float("nan"), 0),
        lambda: ll.Clamp(0, direction=torch.zeros(3)),
        lambda: ll.Clamp(0, direction=torch.ones(1, 3)),
    ],
)
def test_what_can_not_be_used_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ll.ArgumentError):
        make()


def test_directions_span_their_space_whatever_their_length() -> None:
    directions = torch.tensor([[3.0, 0, 0, 0], [1e-3, 1e-3, 0, 0]])
    basis = ll.Project(directions).basis
    assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-6)
    assert torch.allclose(basis @ basis.T, torch.diag(torch.tensor([1.0, 1, 0, 0])), atol=1e-5)
    assert ll.Project(directions.double()).basis.dtype is torch.float64
    assert ll.Project(directions.bfloat16()).basis.dtype is torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: ll.Add(torch.ones(3, device="meta")),
        lambda: ll.Project(torch.ones(3, device="meta")),
        lambda: ll.Clamp(0, direction=torch.ones(3, device="meta")),
    ],
)
def test_a_tensor_without_data_is_refused_by_its_cause(make: Callable[[], Any]) -> None:
    with pytest.raises(ll.ArgumentError, match="meta device"):
        make()


@pytest.mark.parametrize(
    "make", [lambda: ll.Scale(10**400), lambda: ll.Clamp(0, 10**400), lambda: ll.Clamp(-(10**400))]
)
def test_an_integer_that_no_float_holds_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ll.ArgumentError, match="float"):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    assert ll.Scale(np.float32(0.5)).factor == 0.5
    assert ll.Clamp(np.float32(-1), np.int64(2)).high == 2

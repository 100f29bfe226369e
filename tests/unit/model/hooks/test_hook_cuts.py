"""What a narrow hook wants is cut out of a call, and put back, whatever structure holds it."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from lingualinked.errors import ArgumentError
from lingualinked.model.hooks.hook_cuts import (
    cut_tensor,
    first_input,
    first_tensor,
    put_tensor,
    read_positions,
    with_first_input,
    with_first_tensor,
)

STATES = torch.arange(24.0).reshape(2, 4, 3)
NEW = torch.zeros(1)
Pair = namedtuple("Pair", ("left", "right"))  # noqa: PYI024 - as some modules return


@pytest.mark.parametrize("given", [0, -4, slice(1, 3), slice(None, None, 2), [2, 0], range(2), torch.tensor(3), ()])
def test_positions_are_torchs_indices(given: Any) -> None:
    positions = read_positions(given)
    index = list(given) if isinstance(given, range | tuple) else given
    part = cut_tensor(STATES, positions)
    assert torch.equal(part, STATES[:, index])
    part.zero_()
    assert STATES.sum() == 276
    replaced = put_tensor(STATES, positions, part - 1)
    expected = STATES.clone()
    expected[:, index] = -1
    assert torch.equal(replaced, expected)


@pytest.mark.parametrize(
    "given",
    ["last", 1.5, {1: 2}.values, [1.5], [[1]], slice(0, 1.0), slice(None, None, -1), "1", 2**63, slice(0, 2**63), True],
)
def test_other_positions_are_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="positions="):
        read_positions(given)


@pytest.mark.parametrize("mask", [[True, False], torch.tensor([True, False]), np.array([True, False]), np.True_])
def test_a_mask_is_not_taken_for_the_positions_0_and_1(mask: Any) -> None:
    with pytest.raises(ArgumentError, match="positions="):
        read_positions(mask)


def test_without_positions_it_is_the_tensor_itself() -> None:
    assert read_positions(None) is None
    assert cut_tensor(STATES, None) is STATES
    assert put_tensor(STATES, None, NEW) is NEW


@pytest.mark.parametrize(
    "value",
    [
        STATES,
        (STATES, None),
        [None, STATES, STATES],
        {"a": 1, "b": STATES},
        Pair(None, STATES),
        BaseModelOutput(STATES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_first_tensor_of_a_structure(value: Any) -> None:
    assert first_tensor("it", value) is STATES
    replaced = with_first_tensor(value, NEW)
    assert type(replaced) is type(value)
    assert first_tensor("it", replaced) is NEW
    assert first_tensor("it", value) is STATES


def test_the_first_tensor_of_a_call() -> None:
    args, kwargs = (None, 1), {"flag": True, "states": STATES, "mask": NEW}
    assert first_input(args, kwargs) is STATES
    new_args, new_kwargs = with_first_input(args, kwargs, NEW)
    assert (new_args, list(new_kwargs)) == (args, ["flag", "states", "mask"])
    assert new_kwargs["states"] is NEW
    with pytest.raises(ArgumentError, match="a tuple without tensors"):
        first_input((1,), {})

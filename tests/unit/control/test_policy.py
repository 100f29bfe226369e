"""A policy whose values can't be used is refused by the field's name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lingualinked.control.policy import RebalancePolicy
from lingualinked.errors import ArgumentError

FIELDS = [field.name for field in dataclasses.fields(RebalancePolicy)]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", True, None])
def test_values_that_are_no_numbers_in_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=field):
        RebalancePolicy(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("horizon_s", 0),
        ("confidence", 0),
        ("max_memory", 0),
        ("sample_interval_s", 0),
        ("min_gain", 1),
        ("max_memory", 1.5),
    ],
)
def test_limits_are_refused(field: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=field):
        RebalancePolicy(**{field: value})

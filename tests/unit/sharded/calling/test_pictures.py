"""Which further arguments of a call go to the stages, and which are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lingualinked.errors import UnsupportedOperationError
from lingualinked.sharded.calling.pictures import FurtherArguments

NAMES = frozenset({"pixel_values", "input_features"})


def further(*, towers: bool = True) -> FurtherArguments:
    spec: Any = SimpleNamespace(towers=towers)
    return FurtherArguments(spec, NAMES)


def test_pixels_go_to_the_first_stage_alone() -> None:
    arguments = {"pixel_values": torch.zeros(1, 3, 4, 4), "other": 1}
    extras = further().take(arguments, has_positions=True)
    assert extras is not None
    assert (set(extras.for_first), set(extras.for_all)) == ({"pixel_values"}, set())
    assert arguments == {"other": 1}


def test_pictures_without_a_tower_and_sound_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedOperationError, match="towers=False"):
        further(towers=False).take({"pixel_values": torch.zeros(1, 3, 4, 4)}, has_positions=True)
    for towers in (True, False):
        with pytest.raises(UnsupportedOperationError, match="input_features"):
            further(towers=towers).take({"input_features": torch.zeros(1, 2, 3)}, has_positions=True)


def test_pictures_that_no_test_has_shown_are_refused_by_name() -> None:
    spec: Any = SimpleNamespace(towers=True, class_name="AriaForConditionalGeneration")
    unshown = FurtherArguments(spec, NAMES, takes_pictures=False)
    with pytest.raises(UnsupportedOperationError, match=r"AriaForConditionalGeneration .* no test has shown"):
        unshown.take({"pixel_values": torch.zeros(1, 3, 4, 4)}, has_positions=True)

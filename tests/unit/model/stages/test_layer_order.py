"""What stands for a skipped layer returns hidden states as the layers of its family do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from families import FAMILIES, tiny_model
from lingualinked.model.cutting.parts import find_parts
from lingualinked.model.stages.layer_order import Bypass
from lingualinked.model.stages.layer_skips import LayerSkips


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_bypass_returns_what_layers_return(family: str) -> None:
    model: Any = tiny_model(family, torch.float32)
    outputs: list[Any] = []
    parts = find_parts(copy.deepcopy(model).to("meta"))
    layers = model.get_submodule(parts.layers)
    layers[0].register_forward_hook(lambda _, __, output: outputs.append(output))
    model(torch.zeros((1, 2), dtype=torch.long), use_cache=False)
    states = torch.ones(1, 2, 3)
    passed = Bypass(parts.transmission.items[0])(states)
    assert isinstance(passed, tuple) == isinstance(outputs[0], tuple)
    assert (passed[0] if isinstance(passed, tuple) else passed) is states


def test_removed_layers_are_counted() -> None:
    skips = LayerSkips(removed=(1, 4), bypassed=(2,))
    assert [skips.num_before(index) for index in range(7)] == [0, 1, 1, 2, 3, 3, 4]
    assert skips.indices == (1, 4, 2)

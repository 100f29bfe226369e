"""A pass stops at the modules of its points, and may skip those that it is told it may skip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lingualinked.model.hooks.hook_data import HookPoint
from lingualinked.model.hooks.hook_points import HookedPass, ModuleCall


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.fixture
def model() -> Decoder:
    return Decoder()


POINT = HookPoint("layers.1", before=True, after=False, may_skip=True)


@torch.no_grad()
def test_a_skipped_module_does_not_run(model: Decoder) -> None:
    hidden, seen = torch.ones(1, 2), []

    def skip(call: ModuleCall) -> None:
        seen.append(call.path)
        call.output, call.is_skipped = call.args[0] * 3, True

    with HookedPass(model, "layers", (POINT,), skip):
        with HookedPass(model, "layers", (POINT,), lambda call: None):
            assert "forward" in vars(model.layers[1])
        skipped = model(hidden)
    assert torch.equal(skipped, model.layers[0](hidden) * 3)
    assert seen == ["layers.1"]
    assert "forward" not in vars(model.layers[1])


@torch.no_grad()
def test_passes_end_in_any_order_and_leave_the_modules_own_forward(model: Decoder) -> None:
    own: Any = lambda hidden: hidden + 1  # noqa: E731 - as an attribute of the instance
    vars(model.layers[1])["forward"] = own
    first, second = (HookedPass(model, "layers", (POINT,), lambda call: None) for _ in range(2))
    first.__exit__()
    hidden = torch.ones(1, 2)
    assert torch.equal(model(hidden), model.layers[0](hidden) + 1)
    second.__exit__()
    assert vars(model.layers[1])["forward"] is own
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.layers)

"""A model is measured and planned whatever its layers keep of a text, and wherever it forbids cuts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lingualinked as ll
from families import reference
from state_models import OWN, save_state_model

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize("name", ["gemma3n", "mamba", "deepseek-v4", *OWN])
def test_a_plan_is_found_by_measuring(name: str, shared_fork_server: None, cache: Path, tmp_path: Path) -> None:
    folder = save_state_model(name, torch.float32, tmp_path / "model")
    devices = [ll.Device(name=each, threads=1) for each in "ab"]
    with ll.ShardedModel.from_pretrained(folder, devices=devices, progress=False) as model:
        assert model.plan.profile is not None
        uncut = reference(folder)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, uncut(IDS).logits)

"""Weights that the first forward pass has changed are not read as if they were the checkpoint's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lingualinked.cluster.weights.remote_weights import RemoteWeights
from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.weight_bytes import WeightBytes


def test_weights_that_a_first_pass_changes_are_refused_by_name() -> None:
    anything: Any = None
    weights = RemoteWeights(anything, 0, anything, 1.0)
    parts = ModelParts(
        layers="rwkv.blocks",
        num_layers=2,
        prologue=("rwkv.embeddings",),
        epilogue=("head",),
        weights=WeightBytes(layers=(4, 4), prologue=4, epilogue=4),
        changes_weights=True,
    )
    with pytest.raises(UnsupportedOperationError, match=r"rwkv\.blocks\.1\.attention\.output\.weight can't be read"):
        weights.read(parts, "rwkv.blocks.1.attention.output.weight", torch.Size([1]), torch.float32)

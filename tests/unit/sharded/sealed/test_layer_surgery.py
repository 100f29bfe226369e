"""Layers are not removed from a model whose later layers use outputs of earlier ones by their numbers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lingualinked.errors import UnsupportedOperationError
from lingualinked.sharded.sealed.layer_surgery import LayerSurgery
from lingualinked.transmission import Shortcut, Transmission


def test_a_model_with_shortcuts_of_layers_keeps_all_its_layers() -> None:
    layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(4)])
    far = Shortcut(name="layer 1", made_at=1, used_at=(3,), token_bytes=4)
    edits: Any = object()  # which nothing reaches
    surgery = LayerSurgery(layers, edits, Transmission(shortcuts=(far,)))
    with pytest.raises(UnsupportedOperationError, match="use the output of layer 1"):
        surgery.replace(layers, list(layers)[1:])

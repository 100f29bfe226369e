"""What a peer sends of an object of a model's own class is put into it only if it fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import RwkvConfig
from transformers.models.rwkv import modeling_rwkv

from lingualinked.errors import ProtocolError
from lingualinked.model.kv.own_state import OwnState


def state() -> OwnState:
    return OwnState(RwkvConfig(), modeling_rwkv, 2)


def test_a_layer_that_has_moved_is_as_it_was() -> None:
    ours, theirs = state(), state()
    ours.keep([torch.arange(12.0).view(2, 3, 2)], 2)
    theirs.layer(1).write_state(ours.layer(1).read_state(), torch.device("cpu"))
    assert theirs.num_rows == 2
    assert torch.equal(theirs.value[0][..., 1], ours.value[0][..., 1])
    assert not theirs.value[0][..., 0].any()


@pytest.mark.parametrize(
    "given",
    [
        {"state.0": torch.zeros(2)},
        {"num_rows": -1},
        {"num_rows": 1, "class": "torch"},
        {"num_rows": 1, "state.0": "torch.load"},
        {"num_rows": 1, "state.3": torch.zeros(2)},
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        state().layer(0).write_state(given, torch.device("cpu"))

"""A stage's input has the strides that it had where it comes from; impossible ones are refused."""

from __future__ import annotations

import msgspec
import pytest
import torch

from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.tensor_strides import pack_tensor
from lingualinked.worker.steps.step_tensors import split_tensors
from message_examples import STEP

PLAIN = msgspec.structs.replace(
    STEP, mask=MaskMode.FULL, positions=PositionMode.NONE, logits_to_keep=1, instruments=None
)


def test_inputs_have_their_strides_and_other_tensors_are_as_they_came() -> None:
    states, mask = torch.arange(24.0).view(2, 4, 3).transpose(1, 2), torch.ones(2, 3)
    packed, strides = pack_tensor(states)
    (again,), shared = split_tensors(msgspec.structs.replace(PLAIN, strides=strides), (packed, mask))
    assert torch.equal(again, states)
    assert again.stride() == states.stride() == strides
    assert shared == (mask,)


@pytest.mark.parametrize("strides", [(3, 1), (12, 4, 2), (-12, 4, 1), (1 << 40, 4, 1)])
def test_impossible_strides_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"a tensor of shape \[2, 3, 4\] can't have the strides"):
        split_tensors(msgspec.structs.replace(PLAIN, strides=strides), (torch.zeros(2, 3, 4), torch.ones(2, 3)))

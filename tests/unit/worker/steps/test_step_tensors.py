"""A stage's input has the strides that it had where it comes from; impossible ones are refused."""

from __future__ import annotations

import msgspec
import pytest
import torch

from lingualinked.cluster.steps.step_extras import StepExtras
from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.tensor_strides import pack_tensor
from lingualinked.protocol.steps import ExtraTensors
from lingualinked.worker.steps.step_tensors import extras_of, pass_on, split_tensors
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


def test_what_is_for_the_first_stage_goes_no_further() -> None:
    mask, types, pixels = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 3, 8, 8)
    extras = StepExtras(for_all={"token_type_ids": types}, for_first={"pixel_values": pixels}, picture_copies=3)
    step = msgspec.structs.replace(PLAIN, extras=extras.describe())
    _, shared = split_tensors(step, (torch.zeros(2, 3), mask, *extras.tensors))
    given = extras_of(step, shared)
    assert given["token_type_ids"] is types
    assert given["pixel_values"] is pixels
    onward, shared = pass_on(step, shared)
    assert shared == (mask, types)
    assert dict(extras_of(onward, shared)) == {"token_type_ids": types}
    assert onward.extras is not None
    assert onward.extras.picture_copies == 0
    assert pass_on(onward, shared) == (onward, shared)


def test_tensors_of_the_first_stage_alone_leave_nothing() -> None:
    extras = StepExtras(for_first={"pixel_values": torch.zeros(1, 3, 8, 8)})
    step = msgspec.structs.replace(PLAIN, extras=extras.describe())
    mask = torch.ones(2, 3)
    onward, shared = pass_on(step, split_tensors(step, (torch.zeros(2, 3), mask, *extras.tensors))[1])
    assert (onward.extras, shared) == (None, (mask,))


@pytest.mark.parametrize("fields", [(("pixels",), 2), (("pixels", "pixels"), 0)])
def test_further_tensors_have_names(fields: tuple[tuple[str, ...], int]) -> None:
    with pytest.raises(ProtocolError, match="further tensors"):
        ExtraTensors(names=fields[0], num_for_first=fields[1])


def test_those_of_some_rows() -> None:
    both = torch.arange(4).view(2, 2)
    extras = StepExtras(for_all={"token_type_ids": both, "sizes": torch.zeros(3)})
    own = extras.of_rows(slice(1, 2), 2)
    assert own.for_all["token_type_ids"].tolist() == [[2, 3]]
    assert len(own.for_all["sizes"]) == 3

"""What a hooked module is called with survives the way as data; a description that does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from lingualinked.errors import ProtocolError
from lingualinked.model.hooks.hook_data import Entries, Items, ObjectAt, Plain, TensorAt
from lingualinked.model.hooks.hook_values import CallValues
from lingualinked.model.tensor_strides import pack_tensor, unpack_tensor


def test_structures_survive_and_tensors_keep_their_identity() -> None:
    values, tensor, cache = CallValues(), torch.ones(2), DynamicCache()
    given: Any = ((tensor, [1, 2.5, None, "a", True]), {"a": tensor, 3: cache}, BaseModelOutputWithPast(tensor))
    described = values.describe(given, values.objects.append)
    again = values.rebuild(described)
    assert again[0][0] is again[1]["a"] is again[2].last_hidden_state is tensor
    assert again[0][1] == [1, 2.5, None, "a", True]
    assert again[1][3] is cache
    assert type(again[2]) is BaseModelOutputWithPast
    assert values.tensors == [tensor]
    assert values.describe(again, values.objects.append) == described


@pytest.mark.parametrize(
    "value",
    [
        TensorAt(0),
        TensorAt(-1),
        ObjectAt(0, "X", is_cache=False),
        Entries("", ("a",), ()),
        Entries("dict", (), ()),
        Entries("PreTrainedModel", (), ()),
        Items(is_list=False, items=(Plain(1), TensorAt(5))),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError):
        CallValues().rebuild(value)


def test_a_tensor_keeps_its_strides() -> None:
    for tensor in (
        torch.arange(6.0).view(2, 3).T,
        torch.arange(6.0),
        torch.arange(3.0).expand(2, 3),
        torch.arange(6.0).view(2, 1, 3).transpose(0, 2).expand(3, 4, 2),
        torch.tensor(1.0),
        torch.arange(48.0).view(2, 4, 6)[:, 1:3, ::2],
        torch.arange(24.0).view(2, 4, 3).transpose(1, 2)[:, :, 1:3],
    ):
        packed, strides = pack_tensor(tensor)
        again = unpack_tensor(packed, strides)
        assert packed.is_contiguous()
        assert torch.equal(again, tensor)
        assert again.stride() == tensor.stride()


@pytest.mark.parametrize("bias", [None, torch.ones(64)])
def test_products_of_a_tensor_with_gaps_have_the_same_bits(bias: torch.Tensor | None) -> None:
    weight, states = torch.randn(64, 256), torch.randn(2, 40, 512)
    for tensor in (states[..., :256], states[:, 1:9, ::2]):
        again = unpack_tensor(*pack_tensor(tensor))
        assert torch.equal(linear(again, weight, bias), linear(tensor, weight, bias))


@pytest.mark.parametrize("strides", [(1,), (-1, 1), (3, 2), (1000, 1)])
def test_strides_that_can_not_be_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="can't have the strides"):
        unpack_tensor(torch.zeros(2, 3), strides)

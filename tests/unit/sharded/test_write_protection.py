"""Nothing writes to the fetched data of a parameter unnoticed, however torch or NumPy are given its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lingualinked.errors import UnsupportedOperationError
from lingualinked.sharded.weights.fetched_tensor import FetchedTensor
from lingualinked.sharded.weights.remote_tensor import RemoteTensor

DATA = torch.arange(12.0).reshape(3, 4)
ONES = torch.ones(4)


class Weight:
    """A remote parameter with its kept data, and an editor as a sharded model has it."""

    def __init__(self) -> None:
        self.data = DATA.clone()
        self.num_edits = 0
        kept = FetchedTensor.of(self.data, "weight", self)
        with torch.device("meta"):
            parameter = nn.Parameter(torch.empty(DATA.shape))
        self.remote = RemoteTensor.of(parameter, "weight", lambda: kept, self)

    def edit(self, wholes: Any, change: Callable[[Any], Any]) -> Any:
        self.num_edits += 1
        copies = {name: whole.clone() for name, whole in wholes.items()}
        result = change(copies)
        for name, whole in wholes.items():
            whole.copy_(copies[name])
        return result


def assigned_as_data(row: Tensor) -> None:
    other = torch.empty(4)
    other.data = row
    other.add_(1)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "assigned as data": assigned_as_data,
    "set_": lambda row: torch.empty(0).set_(row).add_(1),
    "to_dlpack": lambda row: torch.from_dlpack(torch.utils.dlpack.to_dlpack(row)).add_(1),
    "from_dlpack": lambda row: torch.from_dlpack(row).add_(1),
    "np.from_dlpack": np.from_dlpack,
    "torch.Tensor": lambda row: torch.Tensor(row).add_(1),
    "torch.FloatTensor": lambda row: torch.FloatTensor(row).add_(1),
    "_make_subclass": lambda row: Tensor._make_subclass(Tensor, row).add_(1),
    "as_subclass": lambda row: row.as_subclass(Tensor).add_(1),
    "vmap": torch.vmap(lambda each: each.add_(1)),
    "batch_norm": lambda row: nn.functional.batch_norm(torch.randn(5, 4), row, row, training=True),
}


@pytest.mark.parametrize("write", REFUSED.values(), ids=REFUSED)
def test_what_writes_to_it_past_torchs_functions_is_refused(write: Callable[[Tensor], Any]) -> None:
    weight = Weight()
    with pytest.raises((UnsupportedOperationError, RuntimeError), match=r"weight of a sharded model|data pointer"):
        write(weight.remote[0])
    assert torch.equal(weight.data, DATA)
    assert weight.num_edits == 0


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "apply_": lambda row: row.apply_(lambda value: value + 1),
    "map_": lambda row: row.map_(ONES, lambda value, other: value + other),
    "overload": lambda row: torch.ops.aten.add_.Tensor(row, ONES),
    "overload of copy_": lambda row: torch.ops.aten.copy_.default(row, torch.arange(1.0, 5.0)),
    "list": lambda row: torch._foreach_add_([row], 1),
}


@pytest.mark.parametrize("write", EDITS.values(), ids=EDITS)
def test_what_writes_at_once_or_by_an_overload_is_an_edit(write: Callable[[Tensor], Any]) -> None:
    weight = Weight()
    write(weight.remote[0])
    assert torch.equal(weight.data, torch.cat([DATA[:1] + 1, DATA[1:]]))
    assert weight.num_edits == 1


def test_arrays_are_read_only_and_show_edits() -> None:
    weight = Weight()
    array, whole = weight.remote[0].numpy(), np.asarray(weight.remote)
    for each in (array, whole):
        with pytest.raises(ValueError, match="read-only"):
            each[:] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            each.flags.writeable = True
    weight.remote[0].add_(1)
    assert array.tolist() == whole[0].tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5, 3)])
def test_any_dtype_and_shape_is_read(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    data = torch.ones(shape, dtype=dtype)
    fetched = FetchedTensor.of(data, "weight")
    assert torch.equal(fetched.clone(), data)
    assert fetched.tolist() == data.tolist()

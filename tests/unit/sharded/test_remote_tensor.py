"""Of a parameter whose data is elsewhere everything can be read but the data, and nothing computes with it."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lingualinked as ll
from lingualinked.sharded.remote_tensor import RemoteTensor

STATES = torch.ones(3, 4)

READ: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda tensor: tensor.shape,
    "size": lambda tensor: (tensor.size(), tensor.size(1), tensor.dim(), tensor.ndim, len(tensor)),
    "numel": lambda tensor: (tensor.numel(), tensor.nelement(), torch.numel(tensor)),
    "bytes": lambda tensor: (tensor.nbytes, tensor.element_size()),
    "dtype": lambda tensor: (tensor.dtype, tensor.is_floating_point(), torch.is_complex(tensor), tensor.type()),
    "device": lambda tensor: (tensor.device, tensor.is_cpu, tensor.is_cuda, tensor.is_meta, tensor.get_device()),
    "layout": lambda tensor: (tensor.layout, tensor.stride(), tensor.is_contiguous(), tensor.is_sparse),
    "gradients": lambda tensor: (tensor.requires_grad, tensor.is_leaf, tensor.grad, tensor.grad_fn),
    "what it is": lambda tensor: (
        isinstance(tensor, Tensor),
        isinstance(tensor, nn.Parameter),
        torch.is_tensor(tensor),
    ),
    "itself": lambda tensor: ({tensor: 1}[tensor], hash(tensor) == id(tensor)),
    "its detached shape": lambda tensor: (tensor.detach().shape, tensor.data.dtype, tensor.data.device),
    "what it is already": lambda tensor: (
        tensor.to("cpu") is tensor,
        tensor.to(torch.float32) is tensor,
        tensor.cpu() is tensor,
        tensor.float() is tensor,
        tensor.contiguous() is tensor,
        tensor.type(torch.float32) is tensor,
    ),
    "tensors like it": lambda tensor: (STATES.to(tensor).device, STATES.type_as(tensor).dtype),
}

NEED_DATA: dict[str, Callable[[Tensor], Any]] = {
    "T": lambda weight: STATES @ weight.T,
    "mT": lambda weight: STATES @ weight.mT,
    "linear": lambda weight: functional.linear(STATES, weight),
    "embedding": lambda weight: functional.embedding(torch.tensor([1]), weight),
    "matmul": lambda weight: weight @ torch.ones(4, 2),
    "__getitem__": lambda weight: weight[0],
    "view": lambda weight: weight.view(-1),
    "add": lambda weight: torch.add(torch.ones(8, 4), weight),
    "add_": lambda weight: torch.ones(8, 4).add_(weight),
    "copy_": lambda weight: torch.ones(8, 4).copy_(weight),
    "zero_": lambda weight: weight.zero_(),
    "zero_ of data": lambda weight: weight.data.zero_(),
    "zero_ of detached": lambda weight: weight.detach().zero_(),
    "normal_": nn.init.normal_,
    "data =": lambda weight: setattr(weight, "data", torch.zeros(8, 4)),
    "__setitem__": lambda weight: weight.__setitem__(0, 1.0),
    "out of another operation": lambda weight: torch.add(torch.ones(8, 4), 1, out=weight),
    "half": lambda weight: weight.half(),
    "to": lambda weight: weight.to("meta"),
    "numpy": lambda weight: weight.detach().numpy(),
    "asarray": np.asarray,
    "tolist": lambda weight: weight.tolist(),
    "data_ptr": lambda weight: weight.data_ptr(),
    "storage": lambda weight: weight.untyped_storage(),
    "deepcopy": copy.deepcopy,
    "save": lambda weight: torch.save(weight, io.BytesIO()),
    "equal": lambda weight: torch.equal(weight, weight),
    "in a list": lambda weight: torch.cat([torch.ones(1, 4), weight]),
    "vmap": lambda weight: torch.vmap(lambda row: functional.linear(row, weight))(STATES),
    "aten": lambda weight: torch.ops.aten.mm(weight, torch.ones(4, 1)),
    "foreach": lambda weight: torch._foreach_add([weight], 1.0),
    "tensor": torch.Tensor,
    "swap": lambda weight: torch.utils.swap_tensors(weight, nn.Parameter(torch.zeros(8, 4))),
    "hook": lambda weight: weight.register_hook(print),
    "hook of gradients": lambda weight: weight.register_post_accumulate_grad_hook(print),
}


@pytest.fixture
def weight() -> RemoteTensor:
    return RemoteTensor.of(nn.Parameter(torch.empty(8, 4, device="meta")), "lm_head.weight")


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_reads_as_on_the_unsharded_model(weight: RemoteTensor, read: Callable[[Tensor], Any]) -> None:
    assert read(weight) == read(nn.Parameter(torch.empty(8, 4)))


@pytest.mark.parametrize("use", NEED_DATA.values(), ids=NEED_DATA)
def test_what_needs_the_data_is_refused_by_name(weight: RemoteTensor, use: Callable[[Tensor], Any]) -> None:
    with torch.no_grad(), pytest.raises(ll.UnsupportedOperationError, match=r"lm_head\.weight of a sharded model: \w"):
        use(weight)
    assert type(weight) is RemoteTensor


@pytest.mark.parametrize("use", [float, int, bool, Tensor.item, lambda scale: STATES * scale])
def test_a_scalar_has_no_value(use: Callable[[Tensor], Any]) -> None:
    scale = RemoteTensor.of(torch.empty((), device="meta"), "scale")
    with pytest.raises(ll.UnsupportedOperationError, match=r"scale of a sharded model: \w"):
        use(scale)


def test_the_message_names_what_was_called(weight: RemoteTensor) -> None:
    with pytest.raises(
        ll.UnsupportedOperationError, match=r"^linear of lm_head\.weight of .*: its data is in a worker: \w"
    ):
        functional.linear(STATES, weight)
    with pytest.raises(ll.UnsupportedOperationError, match=r"^T of lm_head"):
        _ = weight.T


def test_gradients_are_not_asked_for_again(weight: RemoteTensor) -> None:
    weight.requires_grad_(True)  # as it does
    weight.requires_grad = False
    assert not weight.requires_grad
    with pytest.raises(ll.UnsupportedOperationError, match=r"requires_grad = of lm_head\.weight .*inference"):
        weight.requires_grad = True


def test_takes_no_memory() -> None:
    whole = nn.Parameter(torch.empty(1 << 40, device="meta"))
    assert RemoteTensor.of(whole, "large").nbytes == 1 << 42
    gc.collect()


def test_another_tensor_can_not_get_its_data(weight: RemoteTensor) -> None:
    other = torch.zeros(8, 4)
    with pytest.raises(RuntimeError):
        other.data = weight
    assert other.sum() == 0

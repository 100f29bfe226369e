"""A parameter whose data is elsewhere reads as the unsharded one, and nothing changes it without effect."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lingualinked as ll
from lingualinked.sharded.weights.fetched_tensor import FetchedTensor
from lingualinked.sharded.weights.remote_tensor import RemoteTensor

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

DATA = torch.arange(32, dtype=torch.float32).view(8, 4).sin()

NEED_DATA: dict[str, Callable[[Tensor], Any]] = {
    "T": lambda weight: STATES @ weight.T,
    "mT": lambda weight: STATES @ weight.mT,
    "linear": lambda weight: functional.linear(STATES, weight),
    "linear, by name": lambda weight: functional.linear(input=STATES, weight=weight),
    "embedding": lambda weight: functional.embedding(torch.tensor([1]), weight),
    "matmul": lambda weight: weight @ torch.ones(4, 2),
    "a row": lambda weight: weight[0],
    "rows": lambda weight: weight[torch.tensor([3, 1, 3])],
    "a part": lambda weight: weight[2:4, ::2],
    "view": lambda weight: weight.view(-1),
    "add": lambda weight: torch.add(torch.ones(8, 4), weight),
    "reflected": lambda weight: 1 - weight * 2,
    "into another": lambda weight: torch.ones(8, 4).add_(weight),
    "copied into another": lambda weight: torch.ones(8, 4).copy_(weight),
    "out of an operation on it": lambda weight: torch.add(weight, 1, out=torch.empty(8, 4)),
    "half": lambda weight: weight.half(),
    "double": lambda weight: weight.to(torch.float64),
    "clone": lambda weight: weight.clone(),
    "detached clone": lambda weight: weight.detach().clone(),
    "like it": torch.zeros_like,
    "norm": lambda weight: weight.norm(dim=-1),
    "svd": lambda weight: list(torch.linalg.svd(weight.float())),
    "eigh": lambda weight: list(torch.linalg.eigh(weight.T @ weight)),
    "einsum": lambda weight: torch.einsum("ij,kj->ik", weight, STATES),
    "numpy": lambda weight: torch.from_numpy(weight.detach().numpy().copy()),
    "data as an array": lambda weight: torch.tensor(np.asarray(weight.data)),
    "tolist": lambda weight: weight.tolist(),
    "tensor": lambda weight: [torch.tensor(weight), torch.as_tensor(weight.detach()).clone()],
    "formatted": lambda weight: f"{weight[0, 0]:.3f} {weight.sum():.2e}",
    "embedding module": lambda weight: nn.Embedding.from_pretrained(weight)(torch.tensor([1, 3])),
    "item": lambda weight: (weight.sum().item(), weight[2, 1].item(), float(weight[0, 0])),
    "deepcopy": copy.deepcopy,
    "save": lambda weight: load(save(weight)),
    "save a row": lambda weight: load(save(weight.detach()[1])),
    "copy": copy.copy,
    "equal": lambda weight: torch.equal(weight, weight),
    "in a list": lambda weight: torch.cat([torch.ones(1, 4), weight]),
    "iteration": lambda weight: [row.sum() for row in weight],
    "unpacked": lambda weight: list(weight.detach().unbind(1)),
    "vmap": lambda weight: torch.vmap(lambda row: functional.linear(row, weight))(STATES),
    "aten": lambda weight: torch.ops.aten.mm(weight, torch.ones(4, 1)),
    "foreach": lambda weight: torch._foreach_add([weight], 1.0),
    "state_dict of another": lambda weight: filled(nn.Linear(4, 8, bias=False), weight),
    "a gradient of what it is used for": lambda weight: gradient(weight.data),
}

REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda weight: weight.add_(1),
    "copy_": lambda weight: weight.copy_(torch.ones(8, 4)),
    "zero_": lambda weight: weight.zero_(),
    "zero_ of data": lambda weight: weight.data.zero_(),
    "zero_ of detached": lambda weight: weight.detach().zero_(),
    "zero_ of a view": lambda weight: weight.view(-1).zero_(),
    "zero_ of a transposed row": lambda weight: weight.T[0].zero_(),
    "zero_ of data of a row": lambda weight: weight[0].data.zero_(),
    "zero_ in iteration": lambda weight: [row.zero_() for row in weight],
    "mul_ of unbound": lambda weight: weight.unbind(0)[1].mul_(2),
    "normal_": nn.init.normal_,
    "orthogonal_": nn.init.orthogonal_,
    "data =": lambda weight: setattr(weight, "data", torch.zeros(8, 4)),
    "data = of a row": lambda weight: setattr(weight[0], "data", torch.zeros(4)),
    "__setitem__": lambda weight: weight.__setitem__(0, 1.0),
    "__setitem__ of a row": lambda weight: weight[0].__setitem__(0, 1.0),
    "out of another operation": lambda weight: torch.add(torch.ones(8, 4), 1, out=weight),
    "out, in a row of it": lambda weight: torch.add(torch.ones(4), 1, out=weight[0]),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
    "data_ptr": lambda weight: weight.data_ptr(),
    "storage": lambda weight: weight.untyped_storage(),
    "storage of a row": lambda weight: weight[0].untyped_storage(),
    "DLPack": lambda weight: torch.from_dlpack(weight[0]),
    "swap": lambda weight: torch.utils.swap_tensors(weight, nn.Parameter(torch.zeros(8, 4))),
    "hook": lambda weight: weight.register_hook(print),
    "hook of gradients": lambda weight: weight.register_post_accumulate_grad_hook(print),
    "gradients of a loss": lambda weight: (nn.Parameter(STATES) @ weight.T).sum().backward(inputs=[weight]),
    "gradients": lambda weight: torch.autograd.grad((nn.Parameter(STATES) @ weight.T).sum(), weight),
}


def filled(module: nn.Module, weight: Tensor) -> Tensor:
    module.load_state_dict({"weight": weight})
    return module(STATES)


def save(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def load(file: io.BytesIO) -> Any:
    return torch.load(file, weights_only=True)


def gradient(weight: Tensor) -> Tensor:
    with torch.enable_grad():
        states = STATES.clone().requires_grad_()
        (states @ weight.detach().T).square().sum().backward()
    assert states.grad is not None
    return states.grad


@pytest.fixture
def weight() -> RemoteTensor:
    meta = nn.Parameter(torch.empty(8, 4, device="meta"))
    return RemoteTensor.of(meta, "lm_head.weight", lambda: FETCHED)


FETCHED = FetchedTensor.of(DATA.clone(), "lm_head.weight")


@pytest.fixture(autouse=True)
def nothing_changes_what_was_fetched() -> Iterator[None]:
    yield
    assert torch.equal(FETCHED, DATA)


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_reads_as_on_the_unsharded_model(read: Callable[[Tensor], Any]) -> None:
    def fetch() -> FetchedTensor:
        raise AssertionError("this needs no data")

    weight = RemoteTensor.of(nn.Parameter(torch.empty(8, 4, device="meta")), "lm_head.weight", fetch)
    assert read(weight) == read(nn.Parameter(torch.empty(8, 4)))
    assert repr(weight) == "<lm_head.weight of a sharded model: float32 [8, 4], in a worker>"


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)
    elif isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert isinstance(ours, nn.Parameter) == isinstance(theirs, nn.Parameter)
    else:
        assert ours == theirs


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("use", NEED_DATA.values(), ids=NEED_DATA)
@torch.no_grad()
def test_what_needs_the_data_equals(weight: RemoteTensor, use: Callable[[Tensor], Any]) -> None:
    assert_same(use(weight), use(nn.Parameter(DATA.clone())))
    assert type(weight) is RemoteTensor


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_would_change_it_is_refused_by_name(weight: RemoteTensor, use: Callable[[Tensor], Any]) -> None:
    with torch.no_grad(), pytest.raises(ll.UnsupportedOperationError, match=r"lm_head\.weight of a sharded model: \w"):
        use(weight)
    assert type(weight) is RemoteTensor


@pytest.mark.parametrize("use", [float, int, bool, Tensor.item, lambda scale: STATES * scale])
def test_a_scalar_has_its_value(use: Callable[[Tensor], Any]) -> None:
    fetched = FetchedTensor.of(torch.tensor(2.5), "scale")
    scale = RemoteTensor.of(torch.empty((), device="meta"), "scale", lambda: fetched)
    assert_same(use(scale), use(torch.tensor(2.5)))


def test_an_array_of_it_is_read_only(weight: RemoteTensor) -> None:
    with pytest.raises(ValueError, match="read-only"):
        weight.detach().numpy()[0] = 1.0


def test_results_require_no_gradients(weight: RemoteTensor) -> None:
    assert not (weight @ STATES.T).requires_grad
    assert not weight[0].requires_grad


def test_the_message_names_what_was_called(weight: RemoteTensor) -> None:
    with (
        torch.no_grad(),
        pytest.raises(
            ll.UnsupportedOperationError, match=r"^mul_ of lm_head\.weight of .*: its data is in a worker: clone"
        ),
    ):
        weight.mul_(2)
    with torch.no_grad(), pytest.raises(ll.UnsupportedOperationError, match=r"^fill_ of lm_head"):
        weight.T[0].fill_(1)


def test_gradients_are_not_asked_for_again(weight: RemoteTensor) -> None:
    weight.requires_grad_(True)  # as it does
    weight.requires_grad = False
    assert not weight.requires_grad
    with pytest.raises(ll.UnsupportedOperationError, match=r"requires_grad = of lm_head\.weight .*inference"):
        weight.requires_grad = True


def test_takes_no_memory() -> None:
    whole = nn.Parameter(torch.empty(1 << 40, device="meta"))
    assert RemoteTensor.of(whole, "large", lambda: FETCHED).nbytes == 1 << 42
    gc.collect()

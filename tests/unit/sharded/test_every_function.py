"""Every function of torch computes with a parameter whose data is elsewhere, and none leaves a change of it without effect.

Every function that torch lists as taking tensors is called with a plain parameter and with one of a sharded model. The
function gives for the latter what it gives for the plain one, or, if it would change it, is refused by name.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import get_testing_overrides, resolve_name
from torch.testing._internal.generated.annotated_fn_args import annotated_args

import lingualinked as ll
from lingualinked.sharded.weights.fetched_tensor import FetchedTensor
from lingualinked.sharded.weights.remote_tensor import RemoteTensor

SIZE = 4
NAMED = {"p": 0.5, "dim": 0, "value": 0.5, "split_size_or_sections": 2, "equation": "ij->i", "size": (SIZE, SIZE)}
OF_TYPE = {
    "bool": True,
    "double": 0.5,
    "float": 0.5,
    "Scalar": 0.5,
    "ScalarType": torch.float64,
    "c10::string_view": "sum",
}
# These move, print or run what they are given, or need an accelerator to say more than that there is none.
NOT_CALLED = {"torch.Tensor.__dir__", "torch.Tensor.__repr__"}
# Two calls for equal plain parameters differ: in memory that nothing has written, in addresses, storages and last bits.
DIFFERS = {
    "torch.empty_like",
    "torch.linalg.lstsq",
    "torch.fbgemm_pack_gemm_matrix_fp16",
    "torch.Tensor.__reduce_ex__",
    "torch.Tensor._cdata.__get__",
    "torch.Tensor.__hash__",
}


def arguments(function: Any, template: Callable[..., Any], make: Callable[[], Tensor], integer: int) -> list[Any]:
    """Make up the positional arguments that a function requires."""
    if function not in annotated_args:
        parameters = inspect.signature(template).parameters.values()
        required = [
            each for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
        ]
        return [NAMED.get(each.name, make()) for each in required]
    found: list[Any] = []
    for each in annotated_args[function]:
        kind = each["simple_type"].removesuffix("?")
        if each.get("is_kwarg_only") == "True":
            continue
        if kind == "Tensor":
            found.append(make())
        elif kind.startswith("Tensor") or kind.endswith("TensorList"):
            found.append([make(), make()])
        elif "[" in kind or "ArrayRef" in kind:
            found.append([integer] * int(each.get("size", 2)))
        else:
            found.append(OF_TYPE.get(kind, integer))
    return found


def call(function: Any, template: Callable[..., Any], make: Callable[[], Tensor], integer: int) -> tuple[str, Any]:
    try:
        return "returned", function(*arguments(function, template, make, integer))
    except ll.UnsupportedOperationError as error:
        return "refused", error
    except Exception as error:  # noqa: BLE001 - any that the plain parameter meets too
        return "raised", error


def parts(value: Any) -> list[Any]:
    return [part for each in value for part in parts(each)] if isinstance(value, tuple | list) else [value]


def has_equal_values(mine: Tensor, other: Tensor) -> bool:
    if mine.dtype == other.dtype == torch.complex32:  # which nothing compares
        mine, other = mine.to(torch.complex64), other.to(torch.complex64)
    if mine.layout == other.layout == torch._mkldnn:
        mine, other = mine.to_dense(), other.to_dense()
    try:
        torch.testing.assert_close(mine.detach().clone(), other.detach().clone(), rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


def says_the_same(ours: Any, theirs: Any) -> bool:
    """Tell whether a result for a sharded parameter is the one for a plain one."""
    if len(parts(ours)) != len(parts(theirs)):
        return False
    for mine, other in zip(parts(ours), parts(theirs), strict=True):
        if isinstance(mine, RemoteTensor):
            if (mine.shape, mine.dtype, mine.device) != (other.shape, other.dtype, other.device):
                return False
        elif isinstance(mine, Tensor):
            if mine.device != other.device or not has_equal_values(mine, other):
                return False
        elif type(mine) is not type(other) or (
            isinstance(mine, bool | int | float | str | torch.dtype) and mine != other
        ):
            return False
    return True


def functions() -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    """List what torch lists, and whatever else of a tensor's methods works in place."""
    listed = get_testing_overrides()
    yield from ((resolve_name(each) or str(each), each, template) for each, template in listed.items())
    for name in dir(Tensor):
        method = getattr(Tensor, name)
        if name.endswith("_") and not name.endswith("__") and method not in listed and callable(method):
            yield f"torch.Tensor.{name}", method, lambda self: None
    for name, function in vars(nn.init).items():
        if name.endswith("_") and not name.startswith("_"):
            yield f"torch.nn.init.{name}", function, function


@pytest.mark.filterwarnings("ignore")
def test_every_function_has_its_effect_or_is_refused(record_property: Callable[[str, object], None]) -> None:
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for name, function, template in functions():
        if name in NOT_CALLED | DIFFERS:
            continue
        for integer in (1, 0):
            plain = nn.Parameter(torch.rand(SIZE, SIZE))
            before = plain.detach().clone()
            fetched = FetchedTensor.of(before.clone(), "lm_head.weight")
            meta = nn.Parameter(torch.empty(SIZE, SIZE, device="meta"))
            remote = RemoteTensor.of(meta, "lm_head.weight", lambda fetched=fetched: fetched)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                theirs, their_result = call(function, template, lambda plain=plain: plain, integer)
                torch.manual_seed(0)
                frozen = nn.Parameter(before.clone(), requires_grad=False)
                _, frozen_result = call(function, template, lambda frozen=frozen: frozen, integer)
                torch.manual_seed(0)
                ours, our_result = call(function, template, lambda remote=remote: remote, integer)
                is_changed = plain.shape != before.shape or not torch.equal(plain.detach().float(), before)
            assert type(remote) is RemoteTensor, name
            assert torch.equal(fetched, before), name
            outcomes[f"{ours}, plain {theirs}"] += 1
            if ours == "refused":
                continue
            if is_changed:
                wrong.append(f"{name} changes a plain parameter, and {ours} {our_result!r}")
            elif ours != theirs or (
                ours == "returned"
                and not any(says_the_same(our_result, each) for each in (their_result, frozen_result))
            ):
                wrong.append(f"{name} {ours} {our_result!r}, for a plain parameter it {theirs} {their_result!r}")
    record_property("outcomes", dict(outcomes))
    assert not wrong, "\n".join(wrong)
    assert outcomes["returned, plain returned"] > 1000
    assert outcomes["refused, plain returned"] > 250
    assert sum(outcomes.values()) > 2500

"""No function of torch computes with a parameter whose data is elsewhere, or leaves a change of it without effect.

Every function that torch lists as taking tensors is called with a plain parameter and with one of a sharded model. The
latter is refused by name, or the function gives what it gives for the plain one, whatever its data.
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
from lingualinked.sharded.remote_tensor import RemoteTensor

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


def says_the_same(ours: Any, theirs: Any) -> bool:
    """Tell whether a result for a sharded parameter is as good as that for a plain one: its data alone may lack."""
    if len(parts(ours)) != len(parts(theirs)):
        return False
    for mine, other in zip(parts(ours), parts(theirs), strict=True):
        if isinstance(mine, RemoteTensor):
            if (mine.shape, mine.dtype, mine.device) != (other.shape, other.dtype, other.device):
                return False
        elif isinstance(mine, Tensor):
            if not (mine.device == other.device and torch.equal(mine, other)):
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


# What says where a tensor lies in this process, so that two plain ones differ in it already.
ADDRESSES = {"torch.Tensor._cdata.__get__", "torch.Tensor.__hash__"}


@pytest.mark.filterwarnings("ignore")
def test_every_function_has_its_effect_or_is_refused(record_property: Callable[[str, object], None]) -> None:
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for name, function, template in functions():
        if name in NOT_CALLED | ADDRESSES:
            continue
        for integer in (1, 0):
            plain = nn.Parameter(torch.rand(SIZE, SIZE))
            before = plain.detach().clone()
            remote = RemoteTensor.of(nn.Parameter(torch.empty(SIZE, SIZE, device="meta")), "lm_head.weight")
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs, their_result = call(function, template, lambda plain=plain: plain, integer)
                ours, our_result = call(function, template, lambda remote=remote: remote, integer)
                is_changed = plain.shape != before.shape or not torch.equal(plain.detach().float(), before)
            assert type(remote) is RemoteTensor, name
            outcomes[f"{ours}, plain {theirs}"] += 1
            if ours == "refused":
                continue
            if is_changed:
                wrong.append(f"{name} changes a plain parameter, and {ours} {our_result!r}")
            elif ours != theirs or (ours == "returned" and not says_the_same(our_result, their_result)):
                wrong.append(f"{name} {ours} {our_result!r}, for a plain parameter it {theirs} {their_result!r}")
    record_property("outcomes", dict(outcomes))
    assert not wrong, "\n".join(wrong)
    assert outcomes["refused, plain returned"] > 1000
    assert sum(outcomes.values()) > 2500

"""Parameters and buffers of a sharded model: tensors whose data is in a worker, and is fetched where it is needed.

Knows torch's tensors only; nothing of modules, workers or the data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor

from lingualinked.errors import UnsupportedOperationError
from lingualinked.sharded.weights.fetched_tensor import Editor, FetchedTensor, function_name, plain, written_by

_DEVICE = torch.device("cpu")  # where a sharded model takes its inputs; below, the tensors are on the meta device
_CHANGE = "its data is in a worker: copy_() other data of its shape and dtype into it"
_TRAIN = "a sharded model is for inference: train the unsharded model"

# Calls that reach a tensor's data without an operation that `__torch_dispatch__` would see.
_REACHES_DATA = frozenset(
    {
        "__array__",
        "__cuda_array_interface__",
        "__deepcopy__",
        "__dlpack__",
        "__reduce_ex__",
        "_typed_storage",
        "const_data_ptr",
        "data_ptr",
        "imag = ",
        "item",
        "mutable_data_ptr",
        "numpy",
        "resize_as",
        "real = ",
        "share_memory_",
        "storage",
        "storage_type",
        "tolist",
        "untyped_storage",
    }
)
_NO_DATA = ("Cannot access data pointer", "data is not allocated")
_NEEDS_GRADIENTS = frozenset({"backward", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"})

Fetch = Callable[[], FetchedTensor]
"""Returns a tensor's data, fetched from the worker that holds it unless it is still here."""


_trying = threading.local()  # has a ``depth`` while a function is tried without data


class _DataNeeded(Exception):  # noqa: N818 - the operation is then run on the data
    """An operation needs the data of a remote tensor."""


class RemoteTensor(Tensor):
    """A parameter or buffer whose data lies in a worker.

    Shape, dtype, device and other metadata read as on the unsharded model on the CPU. A conversion that changes nothing
    returns the tensor itself; ``detach()`` and ``data`` are remote tensors too. Anything that needs the data fetches it, and
    is done with it; results require no gradients. What changes the data in place changes it in the worker.
    """

    remote_name: str  # its name in the whole model; ``name`` is torch's
    remote_fetch: Fetch
    remote_editor: Editor | None  # whose edits can be undone

    @classmethod
    def of(cls, tensor: Tensor, name: str, fetch: Fetch, editor: Editor | None = None) -> RemoteTensor:
        """Make the remote tensor for a tensor on the meta device and its name in the whole model."""
        remote = _wrap(tensor, name, fetch, editor, requires_grad=tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter):
            vars(remote)["_is_param"] = True  # which makes it an nn.Parameter for torch
        return remote

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run what needs no data as it is, and what needs or changes it on fetched data."""
        name, arguments = function_name(func), kwargs or {}
        if name == "device":
            return _DEVICE
        # 1) refuse what asks for gradients, or sets an attribute
        if name in _NEEDS_GRADIENTS or func is torch.autograd.grad:
            _refuse(name, args, arguments, _TRAIN)
        if name in ("requires_grad = ", "requires_grad_"):
            _check_requires_grad(name, *args, **arguments)
        if name == "data = ":
            return _set_data(*args)
        # 2) try without data
        if name not in _REACHES_DATA:
            random_state = torch.get_rng_state() if isinstance(func, FunctionType) else None
            _trying.depth = getattr(_trying, "depth", 0) + 1
            try:
                with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as Tensor's own does, which converts the result too
                    return func(*args, **arguments)
            except _DataNeeded:
                if random_state is not None:
                    torch.set_rng_state(random_state)  # one in Python may have drawn numbers by then
            except RuntimeError as error:  # of a kernel that bypasses it
                if not any(text in str(error) for text in _NO_DATA):
                    raise
            finally:
                _trying.depth -= 1
        # 3) fetch, and do it with the data
        if name in ("__deepcopy__", "__reduce_ex__"):
            copied = _copy(args[0])
            if name == "__deepcopy__":
                args[1][id(args[0])] = copied
                return copied
            return copied.__reduce_ex__(*args[1:])
        fetched: dict[int, RemoteTensor] = {}
        result = func(*_fetch(args, fetched), **_fetch(dict(arguments), fetched))
        return fetched.get(id(result), result)  # what was changed in place

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Stop at every operation on data."""
        if func is torch.ops.prim.device.default:
            return _DEVICE
        if func is torch.ops.aten.detach.default:
            return _wrap(args[0], args[0].remote_name, args[0].remote_fetch, args[0].remote_editor)
        if getattr(_trying, "depth", 0):
            raise _DataNeeded
        if any(isinstance(each, RemoteTensor) for each in written_by(func, args, kwargs or {})):
            raise UnsupportedOperationError(_message(func.overloadpacket.__name__, args, kwargs or {}, _CHANGE))
        return func(
            *_fetch(args, {}), **_fetch(dict(kwargs or {}), {})
        )  # of what asks no `__torch_function__`: torch.tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # as torch.utils.swap_tensors does
            raise UnsupportedOperationError(f"swapping {self.remote_name} of a sharded model: {_CHANGE}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{self.remote_name} of a sharded model: {dtype} {list(self.shape)}, in a worker>"


def _fetch(given: Any, fetched: dict[int, RemoteTensor]) -> Any:
    """Replace remote tensors by their data, in lists and tuples too; record which is whose, by id."""
    if isinstance(given, RemoteTensor):
        data = given.remote_fetch()
        fetched[id(data)] = given
        return data
    if type(given) in (list, tuple):
        return type(given)(_fetch(each, fetched) for each in given)
    if type(given) is dict:
        return {name: _fetch(each, fetched) for name, each in given.items()}
    return given


def _copy(tensor: RemoteTensor) -> Tensor:
    """Return a copy with the data, a parameter if it is one."""
    data = plain(tensor.remote_fetch()).clone()
    return torch.nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else data


def _wrap(
    tensor: Tensor, name: str, fetch: Fetch, editor: Editor | None, *, requires_grad: bool = False
) -> RemoteTensor:
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - so that the subclass is not called again
        shape, strides, dtype = tensor.shape, tensor.stride(), tensor.dtype
    remote = Tensor._make_wrapper_subclass(  # noqa: SLF001
        RemoteTensor,
        shape,
        strides,
        dtype=dtype,
        device=torch.device("meta"),
        dispatch_device=True,
        requires_grad=requires_grad,
    )
    # Access to the memory itself raises an error instead of reading a null pointer.
    torch._C._set_throw_on_mutable_data_ptr(remote)  # noqa: SLF001
    remote.remote_name = name
    remote.remote_fetch = fetch
    remote.remote_editor = editor
    return remote


def _message(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], reason: str) -> str:
    """Return a message that names the operation and its first remote argument."""
    given = [*args, *kwargs.values()]
    given = [item for each in given for item in (each if isinstance(each, list | tuple) else [each])]
    remote = next((each.remote_name for each in given if isinstance(each, RemoteTensor)), "a parameter")
    return f"{name} of {remote} of a sharded model: {reason}"


def _refuse(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], reason: str) -> NoReturn:
    raise UnsupportedOperationError(_message(name.strip(), args, kwargs, reason)) from None


def _check_requires_grad(name: str, tensor: Tensor, requires_grad: bool = True) -> None:
    """Accept the current value and ``False``, since no gradients ever flow; refuse to enable gradients."""
    if requires_grad and not tensor.requires_grad:
        _refuse(name, [tensor], {}, _TRAIN)


def _set_data(tensor: RemoteTensor, data: Tensor) -> None:
    """Copy other data of the same shape and dtype; a conversion that changes nothing assigns a parameter's own."""
    if (
        isinstance(data, RemoteTensor)
        and data.remote_name == tensor.remote_name
        and data.remote_fetch == tensor.remote_fetch
    ):
        return
    if not isinstance(data, Tensor) or (data.shape, data.dtype, data.device) != (tensor.shape, tensor.dtype, _DEVICE):
        _refuse("data =", [tensor], {}, _CHANGE)
    with torch.no_grad():
        tensor.detach().copy_(data)

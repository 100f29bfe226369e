"""Parameters and buffers of a sharded model: everything about them can be read in the caller but their data.

Knows tensors of torch only; nothing of modules, workers or what the data would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lingualinked.errors import UnsupportedOperationError

_REMEDY = "its data is in a worker: read it from the checkpoint, or load the model unsharded with transformers"
_DEVICE = torch.device("cpu")  # where a sharded model takes its inputs; below, the tensors are on the meta device
_CHANGE = "its data is in a worker: change the checkpoint with transformers first, then load it sharded"
_TRAIN = "a sharded model is for inference: train the unsharded model"

# What torch does with a tensor without an operation on its data that `__torch_dispatch__` would see.
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


class RemoteTensor(Tensor):
    """A parameter or buffer whose data lies in a worker.

    Shape, dtype, device and the like read as on the unsharded model, where it would be on the CPU. A conversion to what
    it is already returns it; ``detach()`` and ``data`` are such tensors too. Whatever else needs the data raises
    `UnsupportedOperationError`.
    """

    remote_name: str  # of the whole model's; ``name`` is torch's

    @classmethod
    def of(cls, tensor: Tensor, name: str) -> RemoteTensor:
        """Make the counterpart of a tensor on the meta device.

        Parameters
        ----------
        tensor : Tensor
            A parameter or a buffer.
        name : str
            Its name in the whole model, for messages.
        """
        remote = _wrap(tensor, name, requires_grad=tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter):
            vars(remote)["_is_param"] = True  # for torch, it is an nn.Parameter by this
        return remote

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do what needs no data; refuse the rest under the name by which it was called."""
        name, arguments = _name(func), kwargs or {}
        if name in _REACHES_DATA:
            _refuse(name, args, arguments, _REMEDY)
        if name in _NEEDS_GRADIENTS:
            _refuse(name, args, arguments, _TRAIN)
        if name in ("requires_grad = ", "requires_grad_"):
            _check_requires_grad(name, *args, **arguments)
        if name == "data = ":
            _check_data(*args)
        try:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as Tensor's own does, which converts the result too
                return func(*args, **arguments)
        except UnsupportedOperationError:  # of `__torch_dispatch__`
            _refuse(name, args, arguments, _REMEDY)
        except RuntimeError as error:  # of a kernel that is called past it
            if any(text in str(error) for text in _NO_DATA):
                _refuse(name, args, arguments, _REMEDY)
            raise

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse every operation on data, however it was reached."""
        if func is torch.ops.prim.device.default:
            return _DEVICE
        if func is torch.ops.aten.detach.default:
            return _wrap(args[0], args[0].remote_name)
        raise UnsupportedOperationError(_message(func.overloadpacket.__name__, args, kwargs or {}, _REMEDY))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # as torch.utils.swap_tensors does
            raise UnsupportedOperationError(f"swapping {self.remote_name} of a sharded model: {_REMEDY}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{self.remote_name} of a sharded model: {dtype} {list(self.shape)}, in a worker>"


def _wrap(tensor: Tensor, name: str, *, requires_grad: bool = False) -> RemoteTensor:
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - how a subclass of tensors asks without being asked
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
    # Whatever reaches for the memory itself finds an error there rather than a null pointer.
    torch._C._set_throw_on_mutable_data_ptr(remote)  # noqa: SLF001
    remote.remote_name = name
    return remote


def _name(func: Callable[..., Any]) -> str:
    """Return the name that a user calls a function by, with "=" for the setter of an attribute."""
    name: str = getattr(func, "__name__", str(func))
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    return {"__get__": attribute, "__set__": f"{attribute} = ", "__delete__": f"del {attribute}"}.get(name, name)


def _message(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], reason: str) -> str:
    """Name what is refused, and the first parameter that it was called with."""
    given = [*args, *kwargs.values()]
    given = [item for each in given for item in (each if isinstance(each, list | tuple) else [each])]
    remote = next((each.remote_name for each in given if isinstance(each, RemoteTensor)), "a parameter")
    return f"{name} of {remote} of a sharded model: {reason}"


def _refuse(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], reason: str) -> NoReturn:
    raise UnsupportedOperationError(_message(name.strip(), args, kwargs, reason)) from None


def _check_requires_grad(name: str, tensor: Tensor, requires_grad: bool = True) -> None:
    """Let through what holds, and that a parameter no longer asks for gradients, as none ever flow."""
    if requires_grad and not tensor.requires_grad:
        _refuse(name, [tensor], {}, _TRAIN)


def _check_data(tensor: Tensor, data: Tensor) -> None:
    """Let a parameter be set to its own data, as a conversion to what a module is already does."""
    if not isinstance(data, RemoteTensor) or data.remote_name != tensor.remote_name:  # type: ignore[attr-defined]
        _refuse("data =", [tensor], {}, _CHANGE)

"""The data of a parameter or buffer of a sharded model, fetched from its worker, to be read and not to be changed.

Knows torch's tensors only; nothing of modules, workers or what was fetched when.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lingualinked.errors import UnsupportedOperationError

_CHANGE = "its data is in a worker: clone() it first, or change the checkpoint with transformers and load it sharded"
# Calls by which its memory could be changed without an operation that `_ReadOnly` would see.
_GIVES_MEMORY = frozenset(
    {
        "__cuda_array_interface__",
        "__dlpack__",
        "_typed_storage",
        "const_data_ptr",
        "data_ptr",
        "data = ",
        "imag = ",
        "mutable_data_ptr",
        "real = ",
        "resize_as",
        "share_memory_",
        "storage",
        "storage_type",
        "untyped_storage",
    }
)


class FetchedTensor(Tensor):
    """A fetched tensor or a view of one: results are plain tensors, and what would change it is refused by name."""

    remote_name: str

    @classmethod
    def of(cls, data: Tensor, name: str) -> FetchedTensor:
        """Make the read-only tensor for data that nothing else refers to, and its name in the whole model."""
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - so that the subclass is not called again
            fetched = data.as_subclass(cls)
        fetched.remote_name = name
        return fetched

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function; views remain read-only, and a copy of the data leaves no memory that could be written to."""
        if any(each not in (cls, Tensor, torch.nn.Parameter) for each in types):
            return NotImplemented  # a remote tensor is fetched first
        name, arguments = function_name(func), dict(kwargs or {})
        fetched = {_memory(each): each for each in tensors_in((*args, *arguments.values())) if isinstance(each, cls)}
        held = next(iter(fetched.values())).remote_name
        if name in _GIVES_MEMORY:
            raise _refusal(name, held)
        if name in ("__reduce_ex__", "__deepcopy__", "__format__"):
            args = (plain(args[0]).clone(), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as Tensor's own does, which converts the result too
            if name == "__iter__":
                return iter([cls.of(each, held) for each in args[0].unbind(0)])
            with _ReadOnly(fetched, name) if _may_write(func, name, arguments) else contextlib.nullcontext():
                result = func(*args, **arguments)
        if name in ("numpy", "__array__"):
            result.flags.writeable = False
            return result
        return _protect_views(result, fetched)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(plain(self))


def _may_write(func: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a function could write to a tensor that it is given, by torch's conventions.

    Others run as they are: where a mode is active, some of torch's functions choose another algorithm (``torch.linalg.svdvals``).
    """
    in_place = name.endswith("_") or name.startswith("__i") or name == "__setitem__" or "out" in arguments
    return in_place or getattr(func, "__module__", "") in ("torch.nn.functional", "torch.nn.init")


def plain(tensor: Tensor) -> Tensor:
    """Return a fetched tensor as a plain one that shares its memory: for what only reads."""
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        return tensor.as_subclass(Tensor)


def tensors_in(given: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, in lists and tuples too."""
    for each in given:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_in(each)


def function_name(func: Callable[..., Any]) -> str:
    """Return the name under which a user calls a function; an attribute's setter ends in "="."""
    name: str = getattr(func, "__name__", str(func))
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    return {"__get__": attribute, "__set__": f"{attribute} = ", "__delete__": f"del {attribute}"}.get(name, name)


class _ReadOnly(TorchDispatchMode):
    """Refuses operations that write to the memory of some tensors, by the schemas of torch's operations."""

    def __init__(self, protected: Mapping[int, FetchedTensor], name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._protected, self._name = protected, name

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in written_by(func, args, kwargs or {}):
            written = self._protected.get(_memory(tensor))
            if written is not None:
                raise _refusal(self._name, written.remote_name)
        return func(*args, **(kwargs or {}))


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that one of torch's operations writes to."""
    for index, argument in enumerate(func._schema.arguments):  # noqa: SLF001 - no public name
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in([args[index] if index < len(args) else kwargs.get(argument.name)])


def _refusal(name: str, remote_name: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(f"{name.strip()} of {remote_name} of a sharded model: {_CHANGE}")


def _memory(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 if it has none of its own, as batched and sparse ones."""
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        try:
            return tensor.untyped_storage().data_ptr()
        except (NotImplementedError, RuntimeError):
            return 0


def _protect_views(result: Any, fetched: Mapping[int, FetchedTensor]) -> Any:
    """Make the views in a result read-only."""
    if isinstance(result, Tensor):
        viewed = fetched.get(_memory(result))
        return result if viewed is None else FetchedTensor.of(result, viewed.remote_name)
    if type(result) in (list, tuple):
        return type(result)(_protect_views(each, fetched) for each in result)
    return result

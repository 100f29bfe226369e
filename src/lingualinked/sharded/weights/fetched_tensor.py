"""The data of a parameter or buffer of a sharded model, fetched from its worker; what would change it edits the worker's.

Knows torch's tensors only; nothing of modules, workers or what was fetched when.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lingualinked.errors import UnsupportedOperationError

_CHANGE = "its data is in a worker: clone() it, and copy_() the changed copy into the parameter"
# Calls by which its memory could be changed without an operation that `_Reading` would see.
_GIVES_MEMORY = frozenset(
    {
        "__array_interface__",
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


_WRITES_AT_ONCE = frozenset({"apply_", "map2_", "map_"})  # without an operation that `_Reading` would see
_NO_WRITE = "Cannot access data pointer"


class Editor(Protocol):
    """Edits the tensors of one model in the workers."""

    def edit(self, wholes: Mapping[str, Tensor], change: Callable[[Mapping[str, Tensor]], Any]) -> Any:
        """Call ``change`` with copies of fetched tensors, by name; make workers hold what it has made of them.

        The fetched tensors are then changed likewise. Returns what ``change`` returns.
        """


class FetchedTensor(Tensor):
    """A fetched tensor or a view of one: results are plain tensors, and what changes it changes it in its worker.

    Without an editor, what would change it is refused by name. Torch itself refuses to write to its memory, whatever tensors
    refer to it (RuntimeError).
    """

    remote_name: str
    remote_whole: Tensor  # all of the fetched tensor that this is a view of, contiguous, as a plain one
    remote_editor: Editor | None

    @classmethod
    def of(cls, data: Tensor, name: str, editor: Editor | None = None) -> FetchedTensor:
        """Make the tensor for contiguous data that nothing else refers to, and its name in the whole model."""
        return cls._wrap(_write_protected(data), name, data, editor)

    @classmethod
    def _wrap(cls, view: Tensor, name: str, whole: Tensor, editor: Editor | None) -> FetchedTensor:
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - so that the subclass is not called again
            fetched = view.as_subclass(cls)
        fetched.remote_name, fetched.remote_whole, fetched.remote_editor = name, whole, editor
        return fetched

    def _view(self, view: Tensor) -> FetchedTensor:
        return self._wrap(view, self.remote_name, self.remote_whole, self.remote_editor)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function; a copy of the data leaves no memory that could be written to without an edit."""
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
                return iter([args[0]._view(each) for each in args[0].unbind(0)])  # noqa: SLF001 - its own
            if name in _WRITES_AT_ONCE:
                return _edit(func, name, args, arguments, args[0])
            if name in ("numpy", "__array__"):
                result = func(_same_view(args[0], args[0].remote_whole), *args[1:], **arguments)
                result.flags.writeable = False  # it shows later edits
                return result
            if not _may_write(func, name, arguments):
                with _naming_writes(name, held):
                    result = func(*args, **arguments)
            else:
                random_state = torch.get_rng_state() if isinstance(func, FunctionType) else None
                written: FetchedTensor | None = None
                try:
                    with _Reading(fetched), _naming_writes(name, held):
                        result = func(*args, **arguments)
                except _Written as stop:
                    written = stop.tensor
                    if random_state is not None:
                        torch.set_rng_state(random_state)  # one in Python may have drawn numbers by then
                if written is not None:
                    return _edit(func, name, args, arguments, written)
        return _protect_views(result, fetched)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(plain(self))


@contextlib.contextmanager
def _naming_writes(name: str, held: str) -> Iterator[None]:
    """Raise what torch says of a write to protected memory as an error that names the call and the tensor."""
    try:
        yield
    except RuntimeError as error:
        if _NO_WRITE not in str(error):
            raise
        raise _refusal(name, held) from None


def _may_write(func: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a function could write to a tensor that it is given, by torch's conventions.

    Others run as they are: where a mode is active, some of torch's functions choose another algorithm (``torch.linalg.svdvals``).
    """
    if isinstance(func, torch._ops.OpOverload):  # noqa: SLF001 - no public name
        return bool(func._schema.is_mutable)  # noqa: SLF001
    in_place = name.endswith("_") or name.startswith("__i") or name == "__setitem__" or "out" in arguments
    return in_place or getattr(func, "__module__", "") in ("torch.nn.functional", "torch.nn.init")


def _write_protected(data: Tensor) -> Tensor:
    """Return a tensor with the memory of another one, to which torch's kernels can't write through it."""
    if not data.numel():
        return data
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):  # noqa: SLF001
        shared = torch.from_numpy(data.detach().view(-1).view(torch.uint8).numpy()).view(data.dtype).view(data.shape)
        torch._C._set_throw_on_mutable_data_ptr(shared)  # noqa: SLF001
    return shared


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


class _Written(Exception):  # noqa: N818 - the operation is then run on a copy
    """An operation would write to a fetched tensor."""

    def __init__(self, tensor: FetchedTensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Reading(TorchDispatchMode):
    """Stops at operations that write to the memory of some tensors, by the schemas of torch's operations."""

    def __init__(self, protected: Mapping[int, FetchedTensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._protected = protected

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in written_by(func, args, kwargs or {}):
            if (written := self._protected.get(_memory(tensor))) is not None:
                raise _Written(written)
        return func(*args, **(kwargs or {}))


def _edit(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any], written: FetchedTensor
) -> Any:
    """Run a function that writes to fetched tensors on copies of them, which then become the tensors."""
    editor = written.remote_editor
    given = {
        id(each): each
        for each in tensors_in((*args, *kwargs.values()))
        if isinstance(each, FetchedTensor) and each.remote_editor is editor
    }
    if editor is None or not all(map(_memory, given.values())):
        raise _refusal(name, written.remote_name)

    def change(copies: Mapping[str, Tensor]) -> Any:
        made = {key: _same_view(each, copies[each.remote_name]) for key, each in given.items()}
        layouts = {key: _layout(each) for key, each in made.items()}
        protected = {
            _memory(each): each
            for each in tensors_in((*args, *kwargs.values()))
            if isinstance(each, FetchedTensor) and id(each) not in given
        }
        try:
            with _Reading(protected) if protected else contextlib.nullcontext():
                result = func(*_replace(args, made), **_replace(kwargs, made))
        except _Written as stop:
            raise _refusal(name, stop.tensor.remote_name) from None
        for key, each in made.items():
            if _layout(each) != layouts[key]:
                raise UnsupportedOperationError(
                    f"{name.strip()} of {given[key].remote_name} of a sharded model: its shape and dtype can't change"
                )
        originals = {id(each): given[key] for key, each in made.items()}
        return _replace(result, originals) if isinstance(result, Tensor | list | tuple) else result

    return editor.edit({each.remote_name: each.remote_whole for each in given.values()}, change)


def _same_view(view: FetchedTensor, whole: Tensor) -> Tensor:
    """Return what is to a copy of the whole tensor as a view is to the tensor."""
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        return whole.view(-1).view(view.dtype).as_strided(view.size(), view.stride(), view.storage_offset())


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _replace(given: Any, replacements: Mapping[int, Tensor]) -> Any:
    """Replace tensors by their ids, in lists, tuples and dictionaries too."""
    if isinstance(given, Tensor):
        return replacements.get(id(given), given)
    if type(given) in (list, tuple):
        return type(given)(_replace(each, replacements) for each in given)
    if type(given) is dict:
        return {key: _replace(each, replacements) for key, each in given.items()}
    return given


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that one of torch's operations writes to."""
    for index, argument in enumerate(func._schema.arguments):  # noqa: SLF001 - no public name
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in([args[index] if index < len(args) else kwargs.get(argument.name)])


def _refusal(name: str, remote_name: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(f"{name.strip()} of {remote_name} of a sharded model: {_CHANGE}")


def _memory(tensor: Tensor) -> int:
    """Return what identifies a tensor's memory; 0 if it has none of its own, as batched and sparse ones."""
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        try:
            return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - its address may not be asked for
        except (NotImplementedError, RuntimeError):
            return 0


def _protect_views(result: Any, fetched: Mapping[int, FetchedTensor]) -> Any:
    """Make the views in a result read-only."""
    if isinstance(result, Tensor):
        viewed = fetched.get(_memory(result))
        return result if viewed is None else viewed._view(result)  # noqa: SLF001 - of this module
    if type(result) in (list, tuple):
        return type(result)(_protect_views(each, fetched) for each in result)
    return result

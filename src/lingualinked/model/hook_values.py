"""What a hooked module is called with, and what it returns, as data: nested structures whose tensors travel beside them.

Knows structures, tensors and their memory layout; neither modules nor messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, modeling_outputs
from transformers.utils import ModelOutput

from lingualinked.errors import ProtocolError
from lingualinked.model.hook_data import Entries, HookValue, Items, ObjectAt, Plain, Strides, TensorAt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class CallValues:
    """The tensors and objects of one call of a hooked module, which both ends list in the same order."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.objects: list[Any] = []
        self.described: dict[int, ObjectAt] = {}  # objects by index, as the other end has described them

    def describe(self, value: Any, add_object: Callable[[Any], None]) -> HookValue:
        """Describe a structure, and list the tensors that are new; `add_object` lists a new object, or refuses it."""
        if isinstance(value, Tensor):
            return TensorAt(_index_in(self.tensors, value, self.tensors.append))
        if value is None or type(value) in (bool, float, str) or (type(value) is int and -(2**63) <= value < 2**63):
            return Plain(value)
        if type(value) in (tuple, list):
            return Items(type(value) is list, tuple(self.describe(each, add_object) for each in value))
        if _is_mapping(value):
            output_class = "" if type(value) is dict else type(value).__name__
            items = tuple(self.describe(each, add_object) for each in value.values())
            return Entries(output_class, tuple(value), items)
        index = _index_in(self.objects, value, add_object)
        return self.described.get(index) or ObjectAt(index, type(value).__name__, isinstance(value, Cache))

    def rebuild(self, value: HookValue) -> Any:
        """Rebuild a structure from its description; raise ProtocolError if it names what the call does not have."""
        match value:
            case TensorAt(index=index):
                return _item_of(self.tensors, index)
            case ObjectAt(index=index):
                return _item_of(self.objects, index)
            case Plain():
                return value.value
            case Items():
                items = [self.rebuild(each) for each in value.items]
                return items if value.is_list else tuple(items)
            case Entries():
                if len(value.keys) != len(value.items):
                    raise ProtocolError(f"{len(value.items)} entries arrived with {len(value.keys)} keys")
                entries = dict(zip(value.keys, map(self.rebuild, value.items), strict=True))
                return _output_class(value.output_class)(entries) if value.output_class else entries


def objects_in(value: HookValue) -> Iterator[ObjectAt]:
    """Yield the objects of a structure, in order."""
    if isinstance(value, ObjectAt):
        yield value
    elif isinstance(value, Items | Entries):
        for each in value.items:
            yield from objects_in(each)


def pack_tensor(tensor: Tensor) -> tuple[Tensor, Strides]:
    """Return a tensor as it is sent, contiguous, and its strides if they differ from that."""
    tensor = tensor.detach()
    once = _without_repeats(tensor, tensor.stride())
    is_dense = torch.empty_like(once, device="meta").stride() == once.stride()
    return tensor.contiguous(), None if tensor.is_contiguous() or not is_dense else tensor.stride()


def unpack_tensor(tensor: Tensor, strides: Strides) -> Tensor:
    """Return a tensor with the strides that it had before it was sent; raise ProtocolError if it can't have had them."""
    if strides is None:
        return tensor
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=False))
    if len(strides) != tensor.ndim or min(strides, default=0) < 0 or reach >= tensor.numel():
        raise ProtocolError(f"a tensor of shape {list(tensor.shape)} can't have the strides {list(strides)}")
    once = _without_repeats(tensor, strides)
    own = torch.empty_strided(once.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(once)
    return own.expand(tensor.shape)


def _without_repeats(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a tensor with one item of each dimension whose stride is 0, along which an expanded tensor repeats itself."""
    for dimension, stride in enumerate(strides):
        if stride == 0:
            tensor = tensor.narrow(dimension, 0, min(1, tensor.shape[dimension]))
    return tensor


def _index_in(known: list[Any], value: Any, add: Callable[[Any], None]) -> int:
    for index, each in enumerate(known):
        if each is value:
            return index
    add(value)
    return len(known) - 1


def _item_of(known: list[Any], index: int) -> Any:
    if not 0 <= index < len(known):
        raise ProtocolError(f"a hooked call has {len(known)} of what is numbered {index}")
    return known[index]


def _is_mapping(value: Any) -> bool:
    is_known = type(value) is dict or (
        isinstance(value, ModelOutput) and getattr(modeling_outputs, type(value).__name__, None) is type(value)
    )
    return is_known and all(type(key) in (str, int) for key in value)


def _output_class(name: str) -> type[Any]:
    found = getattr(modeling_outputs, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelOutput)):
        raise ProtocolError(f"{name!r} is not an output class of transformers")
    return found

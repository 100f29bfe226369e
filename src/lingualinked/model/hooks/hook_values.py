"""What a hooked module is called with, and what it returns, as data: nested structures whose tensors travel beside them.

Knows structures and tensors; neither modules nor messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache, modeling_outputs
from transformers.utils import ModelOutput

from lingualinked.errors import ProtocolError
from lingualinked.model.hooks.hook_data import Entries, HookValue, Items, ObjectAt, Plain, TensorAt

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

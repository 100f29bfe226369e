"""One call of a hooked module as the caller's process has it: what arrived of it, and what hooks have changed.

Knows tensors and descriptions of structures; neither modules nor steps.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingualinked.errors import ArgumentError, ProtocolError, UnsupportedOperationError
from lingualinked.model.hooks.hook_data import HookValue, Strides
from lingualinked.model.hooks.hook_values import CallValues, objects_in
from lingualinked.model.tensor_strides import pack_tensor, unpack_tensor
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from lingualinked.protocol.hooking import HookReached
    from lingualinked.sharded.calling.cache import ShardedCache
    from lingualinked.sharded.calling.gradients import StepGradients

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RemoteObject:
    """An object in a worker that a hook was given and may return as it is."""

    def __init__(self, type_name: str) -> None:
        self._type_name = type_name

    def __repr__(self) -> str:
        return f"<{self._type_name} in a worker>"


@dataclasses.dataclass(slots=True)
class HookCall:
    """One call of a module: its values, those that the worker has, and what these are described as."""

    path: str
    stage: int
    values: CallValues = dataclasses.field(default_factory=CallValues)
    known: list[Tensor] = dataclasses.field(default_factory=list)  # copies, to notice what hooks change
    args: HookValue | None = None
    kwargs: HookValue | None = None
    output: HookValue | None = None
    first: int = 0  # index of the first tensor that the last message has added
    held: set[int] = dataclasses.field(default_factory=set)  # which of these hooks have returned before
    attached: list[Tensor] = dataclasses.field(default_factory=list)  # which of these have gradients

    def receive(
        self,
        message: HookReached,
        tensors: tuple[Tensor, ...],
        cache: ShardedCache,
        gradients: StepGradients | None,
    ) -> None:
        """Add what a message says about the call, as part of the user's autograd graph in a step with gradients."""
        if len(tensors) != len(message.strides):
            raise ProtocolError(f"{count_text(len(tensors), 'tensor')} arrived where {len(message.strides)} were due")
        given = list(map(unpack_tensor, tensors, message.strides))
        self.known += [tensor.clone() for tensor in given]
        self.first = len(self.values.tensors)
        if gradients is not None:
            given = gradients.attach_tensors(self.stage, given, message.requires_grad, message.held)
            self.held = {self.first + place for place, number in enumerate(message.held) if number is not None}
        self.attached = [tensor for tensor in given if tensor.requires_grad]
        self.values.tensors += given
        for name in ("args", "kwargs", "output"):
            value = getattr(message, name)
            if value is not None:
                setattr(self, name, value)
                for each in objects_in(value):
                    if each.index == len(self.values.objects):
                        self.values.described[each.index] = each
                        self.values.objects.append(cache if each.is_cache else RemoteObject(each.type_name))

    def describe(self, value: Any) -> HookValue:
        """Describe what a hook has returned; raise UnsupportedOperationError if it can't be sent."""

        def refuse(each: object) -> None:
            raise UnsupportedOperationError(
                f"a hook of {self.path} returned a {type(each).__name__}, which can't be sent to the stage that goes on with it: "
                "return tensors, numbers, strings, None, or tuples, lists and dictionaries of them"
            )

        return self.values.describe(value, refuse)

    def take_changes(self, *, is_last: bool) -> tuple[tuple[int, ...], tuple[Tensor, ...], tuple[Strides, ...]]:
        """Return which tensors were changed in place, the tensors to send, and the strides of those that are new.

        Before the last answer to a call, what its tensors are now is noted, to notice what is changed later.
        """
        given, new = self.values.tensors[: len(self.known)], self.values.tensors[len(self.known) :]
        changed = []
        for index, (tensor, before) in enumerate(zip(given, self.known, strict=True)):
            if tensor.shape != before.shape or tensor.dtype != before.dtype:
                raise UnsupportedOperationError(
                    f"a hook of {self.path} changed the shape or dtype of a tensor in place: return a new one"
                )
            if not has_same_bits(tensor, before):
                changed.append(index)
        for tensor in new:
            if tensor.is_meta or tensor.layout is not torch.strided:
                raise ArgumentError(
                    f"a hook of {self.path} returned a tensor without data, or a sparse one: return a dense one"
                )
        packed = [pack_tensor(tensor.detach().cpu()) for tensor in new]
        if not is_last:
            for index in changed:
                self.known[index] = given[index].detach().clone()
            self.known += [tensor.detach().clone() for tensor in new]
        contents = [given[index].detach().cpu().contiguous() for index in changed]
        return tuple(changed), (*contents, *(tensor for tensor, _ in packed)), tuple(strides for _, strides in packed)

    def take_gradients(self, changed: tuple[int, ...], gradients: StepGradients) -> tuple[int, ...]:
        """Return which tensors have gradients, of those that are new to the stage, or that hooks were given last or have changed."""
        if not all(tensor.requires_grad for tensor in self.attached):
            raise UnsupportedOperationError(
                f"a hook of {self.path} detached a tensor in place, which the stage has too: return tensor.detach()"
            )
        indices = tuple(
            index
            for index, tensor in enumerate(self.values.tensors)
            if tensor.requires_grad and ((index >= self.first and index not in self.held) or index in changed)
        )
        gradients.resume_with(self.stage, [self.values.tensors[index] for index in indices])
        return indices


def has_same_bits(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of a shape and dtype are equal bit for bit, NaN included."""
    dtype = _SAME_SIZE.get(tensor.itemsize)
    with torch.no_grad():
        return torch.equal(tensor.view(dtype), other.view(dtype)) if dtype else torch.equal(tensor, other)

"""The tensors of this worker's stages that the caller has edited, as they were loaded, and the changes in force.

Knows stages and changes; neither plans nor who may edit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.stages.stage import Stage
from lingualinked.model.weights.held_tensors import (
    canonical_name,
    find_tensor,
    holds_tensor,
    sum_of_products,
    write_tensor,
)
from lingualinked.protocol.editing import ChangeKind, EditTensor, TensorChange
from lingualinked.quantities import count_text

_NUM_TENSORS = {ChangeKind.SET: 1, ChangeKind.ADD: 1, ChangeKind.ADD_PRODUCT: 2}


@dataclasses.dataclass(slots=True)
class _Edited:
    """One tensor: as it was loaded, and the changes in force, by number, in order."""

    original: Tensor
    changes: dict[int, tuple[TensorChange, tuple[Tensor, ...]]]


class EditedTensors:
    """The edited tensors of all models on one worker; one that several stages hold is edited once."""

    def __init__(self) -> None:
        self._edited: dict[tuple[int, str], _Edited] = {}  # by model and name

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept of tensors as they were loaded."""
        return sum(each.original.nbytes for each in self._edited.values())

    def original(self, model: int, stage: Stage, name: str) -> Tensor | None:
        """Return an edited tensor as it was loaded, or None if it has not been edited."""
        edited = self._edited.get((model, canonical_name(stage.span, name)))
        return None if edited is None else edited.original

    def edit(self, request: EditTensor, tensors: tuple[Tensor, ...], stages: Iterable[Stage]) -> None:
        """Edit a tensor in all stages that hold it; if that raises, it is as before.

        Raises ProtocolError if none holds it, or the changes do not fit it.
        """
        # 1) find the tensor as it was loaded, and as it is
        holding = [stage for stage in stages if holds_tensor(stage.span, request.name)]
        if not holding:
            raise ProtocolError(f"no stage of model {request.model} holds {request.name!r} here")
        current = find_tensor(holding[0].span, request.name)
        assert current is not None
        key = request.model, canonical_name(holding[0].span, request.name)
        edited = self._edited.get(key)
        if edited is None:
            original, known = current.to("cpu", copy=True, memory_format=torch.contiguous_format), {}
        else:
            original, known = edited.original, edited.changes
        # 2) compute it with the changes: from what it is, if they only add to those in force
        known = known | _with_tensors(request, tensors)
        if missing := [number for number in request.numbers if number not in known]:
            raise ProtocolError(f"changes {missing} of {request.name!r} were never sent")
        num_before = 0 if edited is None else len(edited.changes)
        if edited is not None and tuple(edited.changes) == request.numbers[:num_before]:
            value, due = current.clone(memory_format=torch.contiguous_format), request.numbers[num_before:]
        else:
            value, due = original.to(current.device, copy=True), request.numbers
        for number in due:
            _apply(value, *known[number])
        # 3) write it wherever it is held
        for stage in holding:
            write_tensor(stage.span, request.name, value)
        self._edited[key] = _Edited(original, {number: known[number] for number in request.numbers})
        if not request.numbers:
            del self._edited[key]

    def renew(self, model: int, stage: Stage) -> None:
        """Edit the tensors of a stage that goes into service as those that other stages hold are edited."""
        for (number, name), edited in self._edited.items():
            if number == model and holds_tensor(stage.span, name):
                value = edited.original.to(stage.device, copy=True)
                for change in edited.changes.values():
                    _apply(value, *change)
                write_tensor(stage.span, name, value)

    def drop_unheld(self, model: int, stages: Iterable[Stage]) -> None:
        """Forget the tensors of a model that none of its stages holds any more."""
        held = list(stages)
        for number, name in list(self._edited):
            if number == model and not any(holds_tensor(stage.span, name) for stage in held):
                del self._edited[number, name]


def _with_tensors(
    request: EditTensor, tensors: tuple[Tensor, ...]
) -> dict[int, tuple[TensorChange, tuple[Tensor, ...]]]:
    """Return the new changes of a request with their tensors, by number."""
    if len(tensors) != sum(_NUM_TENSORS[change.kind] for change in request.new):
        raise ProtocolError(
            f"{count_text(len(tensors), 'tensor')} arrived with the changes {[each.kind.name for each in request.new]}"
        )
    remaining = iter(tensors)
    return {
        change.number: (change, tuple(next(remaining) for _ in range(_NUM_TENSORS[change.kind])))
        for change in request.new
    }


def _apply(value: Tensor, change: TensorChange, tensors: tuple[Tensor, ...]) -> None:
    """Apply a change to a tensor in place, by the statements that users know it by."""
    given = [tensor.to(value.device) for tensor in tensors]
    match change.kind:
        case ChangeKind.SET:
            flat = value.view(-1)
            if given[0].dtype != value.dtype or change.first + given[0].numel() > flat.numel():
                raise ProtocolError(
                    f"{list(given[0].shape)} {given[0].dtype} from element {change.first} on do not fit {value.dtype} "
                    f"{list(value.shape)}"
                )
            flat[change.first : change.first + given[0].numel()] = given[0].view(-1)
        case ChangeKind.ADD:
            value.add_(given[0])
        case ChangeKind.ADD_PRODUCT:
            value.add_(sum_of_products(*given))

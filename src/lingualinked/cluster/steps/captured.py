"""What the stages capture in a step: what is due from each, and whether what came can be that.

Knows shapes, plans and devices; neither modules nor who collects the values.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.steps.recorded import RecordedPart
from lingualinked.errors import ProtocolError, WorkerError
from lingualinked.model.hooks.instrument_data import Instruments
from lingualinked.planning.planned_stage import PlannedStage


@dataclasses.dataclass(frozen=True, slots=True)
class CapturedValue:
    """What one device captured in a step of a session: a value of the capture with this number."""

    number: int
    tensor: Tensor
    device: str
    session: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedValue:
    """What a capture is to give in a step, as far as it is known."""

    path: str
    layer: int  # whose stage captures it
    dtype: torch.dtype | None  # None: a dtype of the kind that `is_floating_point` says
    is_floating_point: bool
    shape: tuple[int | None, ...] | None  # None: any; a dimension that is None may have any size
    is_called_once: bool  # whether its module is, in every step

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor can be this value."""
        if self.dtype is not None and tensor.dtype != self.dtype:
            return False
        if tensor.is_floating_point() != self.is_floating_point or (self.is_floating_point and tensor.itemsize < 2):
            return False
        return self.shape in (None, tensor.shape) or (
            len(self.shape) == tensor.ndim
            and all(due in (None, size) for due, size in zip(self.shape, tensor.shape, strict=True))
        )

    def __str__(self) -> str:
        sizes = "any shape" if self.shape is None else [("any" if size is None else size) for size in self.shape]
        return f"{self.dtype or ('floats' if self.is_floating_point else 'no floats')} of {sizes}"


class StepInstruments(Protocol):
    """The captures and interventions in force in a step; the same object in the next one if they are the same."""

    given: Instruments
    tensors: tuple[Tensor, ...]

    def due_captures(self, num_rows: int, num_new: int, past: int) -> Mapping[int, ExpectedValue]:
        """Return what is captured in a step, by number; raise ArgumentError if something can't be done in it."""

    def collect(self, values: list[CapturedValue], trusted: frozenset[str]) -> None:
        """Keep what was captured in a step."""


def join_captured(
    due: Mapping[int, ExpectedValue],
    parts: Mapping[int, object],
    route: Route,
    session: int,
    skipped: Collection[int] = (),
) -> list[CapturedValue]:
    """Return what all stages captured, or raise a WorkerError of a ProtocolError if one sent something else.

    Layers that are ``skipped`` need not have captured anything.
    """
    values: list[CapturedValue] = []
    for index, stage in enumerate(route.plan.stages):
        try:
            values += [
                CapturedValue(number, tensor, stage.device, session)
                for number, tensor in _values_of(parts.get(index), stage, due, skipped)
            ]
        except ProtocolError as error:
            raise WorkerError(stage.device, f"ProtocolError: {error}") from error
    return values


def _values_of(
    part: object, stage: PlannedStage, due: Mapping[int, ExpectedValue], skipped: Collection[int]
) -> Iterator[tuple[int, Tensor]]:
    where = f"what layers [{stage.start}, {stage.end}) captured in a step"
    if not isinstance(part, RecordedPart) or len(part.captured) != len(part.captured_tensors):
        raise ProtocolError(f"{where} came with other tensors than it announced")
    own = {number: value for number, value in due.items() if stage.start <= value.layer < stage.end}
    counts = Counter(part.captured)
    for number, value in own.items():
        if counts[number] != 1 and value.is_called_once and value.layer not in skipped:
            raise ProtocolError(f"{where} has {counts[number]} values of {value.path}, and 1 was due")
    for number, tensor in zip(part.captured, part.captured_tensors, strict=True):
        if number not in own:
            raise ProtocolError(f"{where} has a value of what was not asked for there")
        if not own[number].fits(tensor):
            raise ProtocolError(
                f"{where} has {tensor.dtype} {list(tensor.shape)} of {own[number].path}, where {own[number]} was due"
            )
        yield number, tensor

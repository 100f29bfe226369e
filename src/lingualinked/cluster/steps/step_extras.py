"""Further arguments of a model's forward in one step, such as pictures, and which stages they go to.

Knows names and tensors; neither what they mean nor who runs the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from lingualinked.model.context import SOURCE
from lingualinked.protocol.steps import ExtraTensors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepExtras:
    """Further arguments of a model's forward, by name: for all stages, or for the first one alone.

    Pictures among those for the first stage are encoded by the forward (``picture_copies`` 0), or before it, for so many copies
    in sequence of each row.
    """

    for_all: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    for_first: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    picture_copies: int = 0

    def describe(self) -> ExtraTensors:
        """Return what a step says of them."""
        names = (*self.for_all, *self.for_first)
        return ExtraTensors(names=names, num_for_first=len(self.for_first), picture_copies=self.picture_copies)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Their tensors, in order."""
        return (*self.for_all.values(), *self.for_first.values())

    @property
    def num_source(self) -> int:
        """Tokens of the source per row whose KV the stages keep for later steps; 0: there is none."""
        return self.for_all[SOURCE].shape[1] if SOURCE in self.for_all else 0

    def of_rows(self, rows: slice, num_rows: int) -> StepExtras:
        """Return those of some rows of a batch, if none are for the first stage alone: they need not have rows."""
        assert not self.for_first
        own = {name: each[rows] if len(each) == num_rows else each for name, each in self.for_all.items()}
        return dataclasses.replace(self, for_all=own)

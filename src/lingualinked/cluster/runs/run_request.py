"""What the stages are asked to do in a run: choose the tokens behind a step, and go on with them.

Knows tensors and plain data; neither messages nor sessions.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from lingualinked.model.context import ContextCode, StepContext
from lingualinked.model.sampling.processor_data import BatchRows, ProcessorSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """How the stages choose the tokens behind a step, and go on with them.

    ``upcoming`` are the masks and positions of the next two steps, from which all later ones follow.
    """

    num_steps: int
    processors: tuple[ProcessorSpec, ...]
    input_ids: Tensor  # int64 [rows, tokens], with those of the step
    random_state: Tensor | None  # of torch's generator; None: the likeliest tokens
    unfinished: tuple[bool, ...]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    upcoming: tuple[tuple[Tensor | None, Tensor | None], ...]
    can_undo: bool  # whether what is computed beyond the tokens that count can be dropped
    rows: BatchRows | None = None

    def of_rows(self, first: int, stop: int) -> RunRequest:
        """Return what some rows of the batch are to do."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[first:stop],
            unfinished=self.unfinished[first:stop],
            upcoming=tuple(
                (rows_of(mask, slice(first, stop)), rows_of_positions(positions, slice(first, stop)))
                for mask, positions in self.upcoming
            ),
            rows=BatchRows(first, stop, len(self.unfinished)),
        )

    def later_code(self, context: StepContext) -> ContextCode | None:
        """Return how all steps after the first one encode mask and positions; None if they would have to be sent."""
        context = context.copy(context.num_tokens)
        codes = [context.encode(mask, positions, 1) for mask, positions in self.upcoming]
        is_alike = not any(code.tensors for code in codes) and codes.count(codes[0]) == len(codes)
        return codes[0] if is_alike else None


def rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Return some rows of a tensor, whose only row is that of all."""
    return tensor if tensor is None or len(tensor) == 1 else tensor[rows]


def rows_of_positions(positions: Tensor | None, rows: slice) -> Tensor | None:
    """Return some rows of positions, ``[..., rows, tokens]``, whose only row is that of all."""
    return positions if positions is None or positions.shape[-2] == 1 else positions[..., rows, :]

"""Gives weights that are held here to workers that have no checkpoint, a part at a time.

Knows stages, messages and which moves are announced; not what the weights are for.
"""

from __future__ import annotations

import dataclasses
import secrets

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.moving import FetchWeight, WeightChunk
from lingualinked.quantities import count_text
from lingualinked.worker.moves import AnnouncedMoves
from lingualinked.worker.stages import HostedStages, StageKey

_CHUNK_BYTES = 1 << 20
"""Of a weight in one message: a step waits for no more than this, and whoever asks waits for one step a message."""


@dataclasses.dataclass(slots=True)
class _Loan:
    """What one borrower has of a model: the parameter that it fetches, and the receipt of the last part sent."""

    parameter: str
    flat: Tensor
    receipt: int


class Lender:
    """What one worker lends.

    Parameters
    ----------
    stages : HostedStages
        What the worker hosts.
    moves : AnnouncedMoves
        Says to whom.
    """

    def __init__(self, stages: HostedStages, moves: AnnouncedMoves) -> None:
        self._stages = stages
        self._moves = moves
        self._loans: dict[tuple[int, str], _Loan] = {}  # by model and borrower: one part of one parameter at a time

    def lend(self, request: FetchWeight, borrower: str) -> tuple[WeightChunk, tuple[Tensor, ...]]:
        """Return the answer, and the part of the weight beside it.

        Raises
        ------
        ProtocolError
            If the borrower has not taken the part before: a second one would lie here until it does.
        """
        loan = self._loans.setdefault((request.model, borrower), _Loan("", torch.empty(0), 0))
        if request.receipt != loan.receipt:
            raise ProtocolError(f"{borrower!r} asks for {request.parameter!r} before it has taken the part before")
        loan.receipt = 1 + secrets.randbits(62)
        tensors: tuple[Tensor, ...] = ()
        error = ""
        try:
            tensors = (self._part(request, borrower, loan),)
        except ProtocolError as refusal:
            error = str(refusal)
        answer = WeightChunk(
            request=request.request,
            model=request.model,
            parameter=request.parameter,
            first=request.first,
            error=error,
            receipt=loan.receipt,
        )
        return answer, tensors

    def borrowers(self, model: int) -> tuple[str, ...]:
        """To whom weights of a model may be lent."""
        return self._moves.borrowers(model)

    def forget(self, model: int) -> None:
        """Hold on to nothing of a model that was lent: what holds it may go."""
        self._loans = {(number, name): loan for (number, name), loan in self._loans.items() if number != model}

    def _part(self, request: FetchWeight, borrower: str, loan: _Loan) -> Tensor:
        if loan.parameter != request.parameter:  # what is packed is unpacked once for all its parts
            stage = self._stages.get(StageKey(request.model, request.plan_version, request.stage)).stage
            if not any(
                stage.span.parts.needs(request.parameter, *span)
                for span in self._moves.spans_of(request.model, borrower)
            ):
                raise ProtocolError(f"{request.parameter!r} is for none of the layers that move to {borrower!r}")
            weight = stage.weight(request.parameter)
            if weight is None:
                raise ProtocolError(f"stage {request.stage} holds no {request.parameter!r}")
            loan.parameter, loan.flat = request.parameter, weight.reshape(-1)
        flat = loan.flat
        if not 0 <= request.first < max(flat.numel(), 1):
            raise ProtocolError(
                f"{request.parameter!r} has {count_text(flat.numel(), 'element')}, and none at {request.first}"
            )
        part = flat[request.first : request.first + max(1, _CHUNK_BYTES // flat.element_size())]
        if request.first + part.numel() == flat.numel():
            loan.parameter, loan.flat = "", torch.empty(0)
        return part.cpu()

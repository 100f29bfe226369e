"""Lends weights that this worker holds to workers that have no checkpoint, one part at a time.

Knows stages, messages and announced moves; not what the weights are for.
"""

from __future__ import annotations

import dataclasses
import secrets

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.weights.held_tensors import find_parameter
from lingualinked.protocol.moving import FetchWeight, WeightChunk
from lingualinked.quantities import count_text
from lingualinked.worker.kv.announced_moves import AnnouncedMoves
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey

_CHUNK_BYTES = 1 << 20
"""Bytes of a weight in one message: a step waits for no more than this, and a borrower for one step per message."""


@dataclasses.dataclass(slots=True)
class _Loan:
    """One borrower's state: the parameter that it fetches, and the receipt of the last part sent."""

    parameter: str
    flat: Tensor
    receipt: int


class Lender:
    """The weights that one worker lends, to the borrowers of announced moves."""

    def __init__(self, stages: HostedStages, moves: AnnouncedMoves) -> None:
        self._stages = stages
        self._moves = moves
        self._loans: dict[tuple[int, str], _Loan] = {}  # by model and borrower: one part at a time

    def lend_part(self, request: FetchWeight, borrower: str) -> tuple[WeightChunk, tuple[Tensor, ...]]:
        """Return the answer to a request, and the part of the weight to send with it.

        Raises ProtocolError if the borrower has not received the part before, since a second one would fill memory here.
        """
        loan = self._loans.setdefault((request.model, borrower), _Loan("", torch.empty(0), 0))
        if request.receipt != loan.receipt:
            raise ProtocolError(
                f"{borrower!r} asked for more of {request.parameter!r} before it had received what was sent last"
            )
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

    def drop_model(self, model: int) -> None:
        """Drop all references to a model's lent weights, so that they can be freed."""
        self._loans = {(number, name): loan for (number, name), loan in self._loans.items() if number != model}

    def _part(self, request: FetchWeight, borrower: str, loan: _Loan) -> Tensor:
        if loan.parameter != request.parameter:  # a packed weight is unpacked once for all its parts
            stage = self._stages.get_stage(StageKey(request.model, request.plan_version, request.stage)).stage
            if not any(
                stage.span.parts.needs(request.parameter, *span)
                for span in self._moves.spans_of_party(request.model, borrower)
            ):
                raise ProtocolError(f"{request.parameter!r} belongs to none of the layers that move to {borrower!r}")
            # As it was loaded: the caller sends edits to the stage that it is for.
            weight = self._stages.edited.original(request.model, stage, request.parameter)
            if weight is None:
                weight = find_parameter(stage.span, request.parameter)
            if weight is None:
                raise ProtocolError(f"stage {request.stage} does not hold {request.parameter!r}")
            loan.parameter, loan.flat = request.parameter, weight.reshape(-1)
        flat = loan.flat
        if not 0 <= request.first < max(flat.numel(), 1):
            raise ProtocolError(
                f"element {request.first} of {request.parameter!r} was requested, which has {count_text(flat.numel(), 'element')}"
            )
        part = flat[request.first : request.first + max(1, _CHUNK_BYTES // flat.element_size())]
        if request.first + part.numel() == flat.numel():
            loan.parameter, loan.flat = "", torch.empty(0)
        return part.cpu()

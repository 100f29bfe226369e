"""Requests missing weights from other workers, and delivers them to the loading stages.

Knows holders, messages and peers; neither files nor what the weights are for.
"""

from __future__ import annotations

from torch import Tensor

from lingualinked.errors import LingualinkedError
from lingualinked.protocol.messages import WeightHolder
from lingualinked.protocol.moving import FetchWeight, WeightChunk
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.stages.hosted_stages import HostedStages
from lingualinked.worker.weights.lender import Lender


class Borrower:
    """The weights that one worker borrows; `name` is its own, since it may hold the weights itself."""

    def __init__(self, name: str, stages: HostedStages, lender: Lender, peers: Peers) -> None:
        self._name = name
        self._stages = stages
        self._lender = lender
        self._peers = peers
        self._receipts: dict[tuple[int, str], int] = {}  # of the last chunk, by model and lender

    def request_part(self, request: int, holder: WeightHolder, parameter: str, first: int) -> None:
        """Request the part of a parameter from an element on."""
        message = FetchWeight(
            request=request,
            model=holder.model,
            plan_version=holder.plan_version,
            stage=holder.stage,
            parameter=parameter,
            first=first,
            receipt=self._receipts.get((holder.model, holder.name), 0),
        )
        try:
            if holder.name == self._name:
                answer, tensors = self._lender.lend_part(message, self._name)
                self.receive_chunk(answer, self._name, tensors)
            else:
                self._peers.send(holder.name, message)
        except LingualinkedError as error:
            refused = WeightChunk(
                request=request, model=holder.model, parameter=parameter, first=first, error=str(error), receipt=0
            )
            self._stages.deliver_weight(refused, ())

    def receive_chunk(self, chunk: WeightChunk, lender: str, tensors: tuple[Tensor, ...]) -> None:
        """Deliver a received part to the stage that is loading."""
        self._receipts[chunk.model, lender] = chunk.receipt
        self._stages.deliver_weight(chunk, tensors)

    def drop_model(self, model: int) -> None:
        """Drop the receipts for a model's weights."""
        self._receipts = {key: receipt for key, receipt in self._receipts.items() if key[0] != model}

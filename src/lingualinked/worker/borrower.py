"""Asks other workers for weights that are missing here, and hands on what they send.

Knows holders, messages and peers; neither files nor what the weights are for.
"""

from __future__ import annotations

from torch import Tensor

from lingualinked.errors import LingualinkedError
from lingualinked.protocol.messages import WeightHolder
from lingualinked.protocol.moving import FetchWeight, WeightChunk
from lingualinked.worker.lender import Lender
from lingualinked.worker.peers import Peers
from lingualinked.worker.stages import HostedStages


class Borrower:
    """What one worker borrows.

    Parameters
    ----------
    name : str
        The worker's, which may hold the weights itself.
    stages : HostedStages
        What it hosts and loads.
    lender : Lender
        What it lends.
    peers : Peers
        Whom it may ask.
    """

    def __init__(self, name: str, stages: HostedStages, lender: Lender, peers: Peers) -> None:
        self._name = name
        self._stages = stages
        self._lender = lender
        self._peers = peers
        self._receipts: dict[tuple[int, str], int] = {}  # of what came last, by model and lender

    def fetch(self, request: int, holder: WeightHolder, parameter: str, first: int) -> None:
        """Ask for the part of a parameter from an element on."""
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
                answer, tensors = self._lender.lend(message, self._name)
                self.receive(answer, self._name, tensors)
            else:
                self._peers.send(holder.name, message)
        except LingualinkedError as error:
            refused = WeightChunk(
                request=request, model=holder.model, parameter=parameter, first=first, error=str(error), receipt=0
            )
            self._stages.take_weight(refused, ())

    def receive(self, chunk: WeightChunk, lender: str, tensors: tuple[Tensor, ...]) -> None:
        """Hand a part on to whoever waits for it."""
        self._receipts[chunk.model, lender] = chunk.receipt
        self._stages.take_weight(chunk, tensors)

    def forget(self, model: int) -> None:
        """Begin anew with who lends weights of a model."""
        self._receipts = {key: receipt for key, receipt in self._receipts.items() if key[0] != model}

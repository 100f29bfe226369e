"""Gives weights that are held here to workers that have no checkpoint, a part at a time.

Knows stages and messages; neither who asks nor what for.
"""

from __future__ import annotations

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.moving import FetchWeight, WeightChunk
from lingualinked.quantities import count_text
from lingualinked.worker.stages import HostedStages, StageKey

_CHUNK_BYTES = 1 << 20
"""Of a weight in one message: a step waits for no more than this, and whoever asks waits for one step a message."""


class Lender:
    """What one worker lends.

    Parameters
    ----------
    stages : HostedStages
        What the worker hosts.
    """

    def __init__(self, stages: HostedStages) -> None:
        self._stages = stages
        self._lent: dict[int, tuple[str, Tensor]] = {}  # by request: one parameter of each at a time

    def lend(self, request: FetchWeight) -> tuple[WeightChunk, tuple[Tensor, ...]]:
        """Give the answer, and the part of the weight beside it."""
        try:
            part = self._part(request)
        except ProtocolError as error:
            return self._answer(request, str(error)), ()
        return self._answer(request, ""), (part,)

    def forget(self) -> None:
        """Hold on to nothing that was lent: what holds it may go."""
        self._lent.clear()

    def _part(self, request: FetchWeight) -> Tensor:
        parameter, flat = self._lent.get(request.request, ("", None))
        if flat is None or parameter != request.parameter:  # what is packed is unpacked once for all its parts
            key = StageKey(request.model, request.plan_version, request.stage)
            weight = self._stages.get(key).stage.weight(request.parameter)
            if weight is None:
                raise ProtocolError(f"stage {request.stage} holds no {request.parameter!r}")
            flat = weight.reshape(-1)
            self._lent[request.request] = request.parameter, flat
        if not 0 <= request.first < max(flat.numel(), 1):
            raise ProtocolError(
                f"{request.parameter!r} has {count_text(flat.numel(), 'element')}, and none at {request.first}"
            )
        part = flat[request.first : request.first + max(1, _CHUNK_BYTES // flat.element_size())]
        if request.first + part.numel() == flat.numel():
            del self._lent[request.request]
        return part.cpu()

    @staticmethod
    def _answer(request: FetchWeight, error: str) -> WeightChunk:
        return WeightChunk(request=request.request, parameter=request.parameter, first=request.first, error=error)

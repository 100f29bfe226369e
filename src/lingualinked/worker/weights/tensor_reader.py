"""Reads parameters and buffers of this worker's stages for the caller, one part at a time.

Knows stages and messages; not what the tensors are for.
"""

from __future__ import annotations

from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.model.weights.held_tensors import find_tensor
from lingualinked.protocol.messages import encode
from lingualinked.protocol.reading import ReadTensor, TensorRead
from lingualinked.quantities import count_text
from lingualinked.transport.mailbox import Mailbox
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey

_PART_BYTES = 1 << 20
"""Bytes of a tensor in one message: a step waits for no more than this."""


class TensorReader:
    """The tensors of one worker's stages, as the caller reads them."""

    def __init__(self, stages: HostedStages, mailbox: Mailbox) -> None:
        self._stages = stages
        self._mailbox = mailbox
        # The one that is being read: a packed weight is unpacked once for all its parts.
        self._name: tuple[int, str] | None = None
        self._flat: Tensor | None = None

    def send_part(self, request: ReadTensor) -> None:
        """Send the requested part to the caller; raise ProtocolError if the stage has no such tensor or element."""
        self._mailbox.send(CALLER, encode(TensorRead(request=request.request)), self._find_part(request))

    def drop_model(self, model: int) -> None:
        """Drop the references to a model's weights, so that they can be freed."""
        if self._name is not None and self._name[0] == model:
            self._name = self._flat = None

    def _find_part(self, request: ReadTensor) -> tuple[Tensor, ...]:
        """Return the requested part; nothing if the stage is not hosted here (any more)."""
        try:
            stage = self._stages.get_stage(StageKey(request.model, request.plan_version, request.stage)).stage
        except ProtocolError:
            return ()
        name, flat = (request.model, request.name), self._flat
        if flat is None or self._name != name:
            tensor = find_tensor(stage.span, request.name)
            if tensor is None:
                raise ProtocolError(f"stage {request.stage} does not hold {request.name!r}")
            flat = tensor.reshape(-1)
        end = request.first + max(1, _PART_BYTES // flat.element_size())
        if request.first >= max(flat.numel(), 1):
            raise ProtocolError(
                f"element {request.first} of {request.name!r} was requested, which has {count_text(flat.numel(), 'element')}"
            )
        self._name, self._flat = (name, flat) if end < flat.numel() else (None, None)
        return (flat[request.first : end].cpu(),)

"""Weights fetched from other workers, one after another, if the checkpoint can't be read here or has changed.

Knows names, holders and how to request; the loading thread waits here for what the worker's loop receives.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingualinked.errors import CheckpointError
from lingualinked.model.cutting.parts import parts_of
from lingualinked.model.weights.weight_sources import untied_parameters
from lingualinked.protocol.messages import LoadStage, WeightHolder
from lingualinked.protocol.moving import WeightChunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RequestPart = Callable[[WeightHolder, str, int], None]
"""Requests the part of a parameter from an element on from its holder; called in the loading thread."""


class BorrowedWeights:
    """A `lingualinked.model.weights.weight_sources.WeightSource` of the weights that the stages of the current plan hold.

    Parts are requested with `request_part` and delivered by `deliver_chunk`; `check_cancelled` raises once the stage is no
    longer wanted. Tied parameters appear in `shapes` under their source's name only.
    """

    def __init__(
        self,
        meta_model: PreTrainedModel,
        request: LoadStage,
        request_part: RequestPart,
        check_cancelled: Callable[[], None],
    ) -> None:
        self._like = untied_parameters(meta_model)
        self._parts = parts_of(request.spec, meta_model)
        self._holders = request.holders
        self._request_part = request_part
        self._check_cancelled = check_cancelled
        self._answers: queue.SimpleQueue[tuple[WeightChunk, tuple[Tensor, ...]] | None] = queue.SimpleQueue()
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in self._like.items()
        }
        self.num_bytes_read = 0
        self.last_asked = ""

    def prepare(self, names: Iterable[str]) -> None:
        """Do nothing: each is requested when it is read."""

    def read_tensor(self, name: str) -> Tensor:
        """Fetch one parameter, or raise CheckpointError if no worker holds it or the received parts do not fit."""
        like = self._like[name]
        tensor = torch.empty(like.shape, dtype=like.dtype)
        flat, holder, first = tensor.view(-1), self._holder_of(name), 0
        while first < flat.numel():
            self._check_cancelled()
            self.last_asked = holder.name
            self._request_part(holder, name, first)
            part = self._wait_for_part(holder, name, first)
            if part.dtype != flat.dtype or part.ndim != 1 or not 0 < part.numel() <= flat.numel() - first:
                raise CheckpointError(
                    f"device {holder.name!r} sent {list(part.shape)} {part.dtype} for {name} from element {first} on, "
                    f"and {name} has {flat.numel()} of {flat.dtype}"
                )
            flat[first : first + part.numel()] = part
            first += part.numel()
            self.num_bytes_read += part.nbytes
        return tensor

    def deliver_chunk(self, chunk: WeightChunk, tensors: tuple[Tensor, ...]) -> None:
        """Deliver a received part to the loading thread; called on the worker's loop."""
        self._answers.put((chunk, tensors))

    def cancel(self) -> None:
        """Make the loading thread check again whether the stage is still wanted."""
        self._answers.put(None)

    def close(self) -> None:
        """Do nothing: there is no file."""

    def _wait_for_part(self, holder: WeightHolder, name: str, first: int) -> Tensor:
        while True:
            answer = self._answers.get()
            self._check_cancelled()
            if answer is None:
                continue
            chunk, tensors = answer
            if chunk.error:
                raise CheckpointError(f"device {holder.name!r} can't lend {name}: {chunk.error}")
            if (chunk.parameter, chunk.first) == (name, first) and len(tensors) == 1:
                return tensors[0]
            raise CheckpointError(f"device {holder.name!r} sent {chunk.parameter}, and {name} was requested")

    def _holder_of(self, name: str) -> WeightHolder:
        """Find the holder of a parameter; the first or the last stage holds those outside the layers."""
        layer = self._parts.layer_of(name)
        for holder in self._holders:
            if layer is not None:
                holds = holder.start <= layer < holder.end
            elif any(name == path or name.startswith(f"{path}.") for path in self._parts.epilogue):
                holds = holder.end == self._parts.num_layers
            else:
                holds = holder.start == 0
            if holds and not holder.lends:
                raise CheckpointError(
                    f"{name} is on device {holder.name!r}, which is trusted and lends no weights to untrusted devices: make "
                    "the checkpoint readable on this device, mark it trusted, or leave these layers where they are"
                )
            if holds:
                return holder
        raise CheckpointError(f"no worker holds {name}")

"""Weights that other workers hold, fetched one after the other where the checkpoint can't be read, or is another by now.

Knows names, holders and how to ask; a thread that loads waits here for what the worker's loop receives.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingualinked.errors import CheckpointError
from lingualinked.model.parts import find_parts
from lingualinked.model.weights import untied_parameters
from lingualinked.protocol.messages import LoadStage, WeightHolder
from lingualinked.protocol.moving import WeightChunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ask = Callable[[WeightHolder, str, int], None]
"""Asks a holder for the part of a parameter from an element on; called in the thread that loads."""


class BorrowedWeights:
    """A `lingualinked.model.weights.WeightSource` of what the stages in force hold.

    Parameters
    ----------
    meta_model : PreTrainedModel
        The whole model, on the meta device.
    request : LoadStage
        Names the holders.
    ask : Ask
        How parts are asked for; they come by `take`.
    check_wanted : callable
        Raises where the stage is not wanted any more.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        By parameter name; tied parameters under their source's name alone.
    num_bytes_read : int
        Fetched so far.
    asked : str
        The holder that was asked last.
    """

    def __init__(
        self, meta_model: PreTrainedModel, request: LoadStage, ask: Ask, check_wanted: Callable[[], None]
    ) -> None:
        self._like = untied_parameters(meta_model)
        self._parts = find_parts(meta_model)
        self._holders = request.holders
        self._ask = ask
        self._check_wanted = check_wanted
        self._answers: queue.SimpleQueue[tuple[WeightChunk, tuple[Tensor, ...]] | None] = queue.SimpleQueue()
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in self._like.items()
        }
        self.num_bytes_read = 0
        self.asked = ""

    def read(self, name: str) -> Tensor:
        """Fetch one parameter.

        Raises
        ------
        CheckpointError
            If no worker holds it, or what came does not fit.
        """
        like = self._like[name]
        tensor = torch.empty(like.shape, dtype=like.dtype)
        flat, holder, first = tensor.view(-1), self._holder_of(name), 0
        while first < flat.numel():
            self._check_wanted()
            self.asked = holder.name
            self._ask(holder, name, first)
            part = self._next(holder, name, first)
            if part.dtype != flat.dtype or part.ndim != 1 or not 0 < part.numel() <= flat.numel() - first:
                raise CheckpointError(
                    f"device {holder.name!r} sent {list(part.shape)} {part.dtype} for {name} from element {first} on, "
                    f"which has {flat.numel()} of {flat.dtype}"
                )
            flat[first : first + part.numel()] = part
            first += part.numel()
            self.num_bytes_read += part.nbytes
        return tensor

    def take(self, chunk: WeightChunk, tensors: tuple[Tensor, ...]) -> None:
        """Hand over what has come; called on the worker's loop."""
        self._answers.put((chunk, tensors))

    def cancel(self) -> None:
        """Have the thread that waits look whether the stage is still wanted."""
        self._answers.put(None)

    def close(self) -> None:
        """Do nothing: there is no file."""

    def _next(self, holder: WeightHolder, name: str, first: int) -> Tensor:
        while True:
            answer = self._answers.get()
            self._check_wanted()
            if answer is None:
                continue
            chunk, tensors = answer
            if chunk.error:
                raise CheckpointError(f"device {holder.name!r} can't give {name}: {chunk.error}")
            if (chunk.parameter, chunk.first) == (name, first) and len(tensors) == 1:
                return tensors[0]
            raise CheckpointError(f"device {holder.name!r} sent {chunk.parameter} where {name} was asked for")

    def _holder_of(self, name: str) -> WeightHolder:
        """Find who holds a parameter: a layer's stage, the first or the last one for what lies around the layers."""
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
                    f"{name} is on device {holder.name!r}, which is trusted and lends no weights to one that is not: make "
                    "the checkpoint readable on this device, mark it trusted, or leave these layers where they are"
                )
            if holds:
                return holder
        raise CheckpointError(f"no worker holds {name}")

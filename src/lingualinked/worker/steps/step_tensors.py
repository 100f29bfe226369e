"""The tensors that come with a step: which are the stage's inputs, as they were where they come from, and which other stages get too.

Knows the message of a step; no sessions and no stages.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.tensor_strides import unpack_tensor
from lingualinked.protocol.steps import ExtraTensors, Step


def split_tensors(step: Step, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Split the tensors of a step into the stage's inputs, and what is for all stages: mask, positions, and so on.

    Raises ProtocolError if some are missing, or the inputs have no rows, no tokens or other strides than are possible.
    """
    num_shared = (step.mask is MaskMode.FULL) + (step.positions is PositionMode.FULL) + (step.logits_to_keep is None)
    num_shared += 0 if step.instruments is None else step.instruments.num_tensors
    num_shared += 0 if step.extras is None else len(step.extras.names)
    num_inputs = len(tensors) - num_shared
    if num_inputs < 1 or tensors[0].ndim < 2 or 0 in tensors[0].shape[:2]:
        raise ProtocolError(
            f"a step arrived with the tensors {[list(tensor.shape) for tensor in tensors[:9]]}, of which "
            f"{num_shared} are announced besides its inputs: inputs must have rows and tokens, at least one of each"
        )
    states = unpack_tensor(tensors[0], step.strides)
    return (states, *tensors[1:num_inputs]), tensors[num_inputs:]


def extras_of(step: Step, shared: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    """Return the further arguments of the model's forward, which are the last of the tensors for all stages."""
    names = () if step.extras is None else step.extras.names
    return dict(zip(names, shared[len(shared) - len(names) :], strict=True))


def pass_on(step: Step, shared: tuple[Tensor, ...]) -> tuple[Step, tuple[Tensor, ...]]:
    """Return a step and its tensors for all stages without those that are for the first stage alone."""
    extras = step.extras
    if extras is None or not extras.num_for_first:
        return step, shared
    names = extras.names[: -extras.num_for_first]
    kept = ExtraTensors(names=names, num_for_first=0) if names else None
    return msgspec.structs.replace(step, extras=kept), shared[: -extras.num_for_first]

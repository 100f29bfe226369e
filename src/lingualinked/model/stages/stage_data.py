"""What a stage is given in a step, and what it gives.

Knows tensors and the session's KV cache by its size; no modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lingualinked.model.adapters.adapter_data import AdapterUse
from lingualinked.model.hooks.hook_data import HookPoint
from lingualinked.model.hooks.hook_points import ModuleCall
from lingualinked.model.hooks.instruments import StageInstruments
from lingualinked.model.process.torch_settings import TorchSettings
from lingualinked.model.stages.autograd_graph import AutogradGraph
from lingualinked.model.stages.layer_skips import NO_SKIPS, LayerSkips
from lingualinked.model.stages.step_graphs import DecodeInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lingualinked.model.kv.kv_cache import StageCache


@dataclass(slots=True, kw_only=True)
class StageInputs:
    """The inputs of a stage in one step."""

    # First stage: token ids [rows, tokens] int64, or embeddings [rows, tokens, hidden]. Later: the previous stage's output.
    tensors: tuple[Tensor, ...]
    layout: tuple[bool, ...] | None  # None for a single tensor, else which items of a tuple are tensors, not None
    attention_mask: Tensor | None  # [rows, past + tokens] int64
    position_ids: Tensor | None  # [rows or 1, tokens] int64
    shape: tuple[int, int] | None = None  # rows and new tokens, where the tensors do not show them
    shortcuts: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # what other stages have made, by the name of the shortcut
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # further arguments of the model's forward, by name
    picture_copies: int = (
        0  # 0: pictures among them are encoded by the forward; else before it, for so many copies of a row
    )
    logits_to_keep: int | Tensor = 0  # for the last stage: the number of last positions, 0 for all, or indices
    wants_logits: bool = True  # else the last stage ends with its last layer, and has no output
    rope_reach: int = 0  # how far rotary embeddings are stretched before the step; 0 leaves them as they are
    torch_settings: TorchSettings = field(default_factory=dict)  # the caller's
    records: tuple[str, ...] = ()  # what the model's output is to hold besides logits, such as "hidden_states"
    hidden_state_indices: tuple[int, ...] | None = None  # which hidden states are to be recorded; None: all
    hooks: tuple[HookPoint, ...] = ()  # where the step stops: then `pause` waits until the hooks of a module have run
    pause: Callable[[ModuleCall], tuple[HookPoint, ...] | None] | None = None
    instruments: StageInstruments | None = None  # captures and interventions at its modules
    captures: bool = False  # whether captures count in this step
    past: int = 0  # tokens before the step
    skips: LayerSkips = NO_SKIPS
    graph: AutogradGraph | None = None  # for gradients; None if none will be asked for
    adapters: AdapterUse | None = None  # None: none are active


@dataclass(slots=True, kw_only=True)
class StageOutput:
    """The outputs of a stage in one step: computed, on the CPU or on the stage's GPU."""

    tensors: tuple[Tensor, ...]  # the last layer's output; from the last stage, logits [rows, kept tokens, vocabulary]
    layout: tuple[bool, ...] | None
    shape: tuple[int, int] | None = None  # as in `StageInputs`, for the next stage
    shortcuts: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # what later stages use of this one, by the name of the shortcut
    recorded: Mapping[str, tuple[Tensor | None, ...]] = field(default_factory=dict)  # of its layers, in order
    captured: Sequence[tuple[int, Tensor]] = ()  # by the numbers of the instruments
    requires_grad: tuple[bool, ...] | None = None  # which of the tensors have gradients; None if none will be asked for
    ends_at_tap: bool = False  # whether it is what hooks have returned, in a step with gradients


def decode_inputs(inputs: StageInputs, cache: StageCache) -> DecodeInputs | None:
    """Return the inputs of a step that does the same on the device each time; None if it may not."""
    mask, keep = inputs.attention_mask, inputs.logits_to_keep
    if (
        len(inputs.tensors) != 1
        or inputs.tensors[0].shape[1] != 1
        or not inputs.tensors[0].is_contiguous()
        or inputs.records
        or inputs.shortcuts
        or inputs.shape is not None
        or inputs.extras
        or inputs.hooks
        or inputs.instruments is not None
        or inputs.graph is not None
        or not inputs.wants_logits
        or inputs.skips != NO_SKIPS
        or not isinstance(keep, int)
    ):
        return None
    if mask is not None and (mask.ndim != 2 or mask.shape[1] != cache.num_tokens + 1):
        return None
    return DecodeInputs(states=inputs.tensors[0], mask=mask, positions=inputs.position_ids)


def check_indices(indices: int | Tensor, size: int) -> None:
    """Raise IndexError as torch does on a CPU; on a GPU, such an index would end all that it computes for this process."""
    if isinstance(indices, Tensor) and indices.dtype is not torch.bool and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < -size or high >= size:
            raise IndexError(f"index {low if low < -size else high} is out of bounds for dimension 0 with size {size}")

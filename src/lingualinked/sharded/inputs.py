"""Checks what a user passes to ``forward`` before anything is sent.

Knows shapes and ranges; nothing here computes.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import TransformersKwargs

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.model.parts import learned_positions
from lingualinked.quantities import count_text

_RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """The positions that a model has learned embeddings for.

    Parameters
    ----------
    num_positions : int
        How many.
    counted_in_mask : bool
        Whether the model counts positions in the attention mask, rather than from the first token, padding or not.
    """

    num_positions: int
    counted_in_mask: bool

    @classmethod
    def of(cls, meta: PreTrainedModel) -> LearnedPositions | None:
        """Look at a model on the meta device; ``None`` where positions are computed (rotary, ALiBi)."""
        num_positions = learned_positions(meta)
        if num_positions is None:
            return None
        embeddings = [module for module in meta.modules() if isinstance(module, nn.Embedding)]
        counted = any("attention_mask" in inspect.signature(module.forward).parameters for module in embeddings)
        return cls(num_positions=num_positions, counted_in_mask=counted)

    def check(self, past: int, num_new: int, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Refuse a step that goes beyond them.

        Raises
        ------
        ArgumentError
            With the number of positions that the step would need.
        """
        if position_ids is not None:
            needed = int(position_ids.max()) + 1
        elif self.counted_in_mask and attention_mask is not None and attention_mask.ndim == 2:
            needed = int((attention_mask.cumsum(-1) * attention_mask)[:, past:].max())
        else:
            needed = past + num_new
        if needed > self.num_positions:
            raise ArgumentError(
                f"{needed:,} tokens are more than the {count_text(self.num_positions, 'position')} that this model has learned: "
                "shorten the text or generate fewer tokens"
            )


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, vocabulary: int) -> Tensor:
    """Return the ids or the embeddings, on the CPU, once they are known to be usable.

    Parameters
    ----------
    input_ids : Tensor or None
        Integers ``[rows, tokens]``.
    inputs_embeds : Tensor or None
        ``[rows, tokens, hidden]``.
    vocabulary : int
        Rows of the embedding.

    Raises
    ------
    ArgumentError
        If both or neither is given, the shape is wrong or empty, or an id is outside the vocabulary.
    UnsupportedOperationError
        If gradients are asked for.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError("give input_ids or inputs_embeds, one of them")
    inputs = input_ids if input_ids is not None else inputs_embeds
    name, dims = ("input_ids", 2) if input_ids is not None else ("inputs_embeds", 3)
    if not isinstance(inputs, Tensor):
        raise ArgumentError(f"{name} is a {type(inputs).__name__}: give a tensor (return_tensors='pt')")
    if inputs.ndim != dims or inputs.numel() == 0:
        raise ArgumentError(f"{name} of shape {tuple(inputs.shape)} must have {dims} dimensions and be non-empty")
    if inputs.requires_grad and torch.is_grad_enabled():
        raise UnsupportedOperationError(
            f"{name} require gradients, which do not flow through a sharded model: "
            "call it under torch.no_grad(), or detach them"
        )
    inputs = inputs.detach().cpu()
    if input_ids is not None:
        if inputs.is_floating_point():
            raise ArgumentError(f"input_ids have dtype {inputs.dtype}: ids are integers")
        low, high = int(inputs.min()), int(inputs.max())
        if low < 0 or high >= vocabulary:
            raise ArgumentError(
                f"input_ids range from {low} to {high}, the vocabulary from 0 to {vocabulary - 1}: "
                "is this the model's own tokenizer?"
            )
        inputs = inputs.long()
    return inputs


def check_tensor(name: str, value: object, dims: Collection[int]) -> Tensor | None:
    """Return an optional tensor on the CPU, once its number of dimensions is known to be one of these.

    Raises
    ------
    UnsupportedOperationError
        For masks per kind of layer, which transformers takes as a dict.
    ArgumentError
        If it is something else, or has other dimensions.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        raise UnsupportedOperationError(f"{name} as a mapping is not supported by a sharded model: give one tensor")
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} is a {type(value).__name__}: give a tensor")
    if value.ndim not in dims:
        numbers = " or ".join(map(str, dims))
        raise ArgumentError(f"{name} of shape {tuple(value.shape)} must have {numbers} dimensions")
    return value.detach().cpu()


def check_logits_to_keep(value: object) -> int | Tensor:
    """Return a number of positions, or their indices on the CPU.

    Raises
    ------
    ArgumentError
        If it is neither an integer nor a tensor.
    """
    if isinstance(value, Tensor):
        return value.cpu()
    try:
        return int(operator.index(value))  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(f"logits_to_keep={value!r} must be an integer or a tensor of indices") from None


def refuse_arguments(config: PreTrainedConfig, arguments: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse by name what ``forward`` does not do.

    Parameters
    ----------
    config : PreTrainedConfig
        What it says of outputs holds where the arguments say nothing.
    arguments : mapping of str to object
        Those that `ShardedCausalLM.forward` has no use for.
    known : collection of str
        The parameters of the model's own ``forward``.

    Raises
    ------
    UnsupportedOperationError
        For an argument that transformers knows.
    ArgumentError
        For one that it doesn't.
    """
    for name in _RECORDED:
        value = arguments.get(name)
        if value or (value is None and getattr(config, name, False)):
            whose = "" if value else "config."
            raise UnsupportedOperationError(
                f"{whose}{name} is not supported by a sharded model, whose layers are in workers: set it to False"
            )
    for name, value in arguments.items():
        if value is None or name in _RECORDED:
            continue
        if name in known or name in TransformersKwargs.__optional_keys__:
            raise UnsupportedOperationError(f"{name} is not supported by a sharded model: leave it out")
        raise ArgumentError(f"unknown argument {name!r} of forward")

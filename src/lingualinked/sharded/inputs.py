"""Checks what a user passes to ``forward`` before anything is sent.

Knows shapes and ranges; nothing here computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from lingualinked.errors import ArgumentError, UnsupportedOperationError
from lingualinked.sharded.cache import ShardedCache


def check_ids(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, vocabulary: int, num_positions: int | None, past: int
) -> Tensor:
    """Return the ids or the embeddings, on the CPU, once they are known to be usable.

    Parameters
    ----------
    input_ids : Tensor or None
        int64 ``[rows, tokens]``.
    inputs_embeds : Tensor or None
        ``[rows, tokens, hidden]``.
    vocabulary : int
        Rows of the embedding.
    num_positions : int or None
        Learned positions of the model, if it has such.
    past : int
        Tokens before these.

    Raises
    ------
    ArgumentError
        If both or neither is given, the shape is wrong or empty, an id is outside the vocabulary, or the text is
        longer than the learned positions.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError("give input_ids or inputs_embeds, one of them")
    inputs = input_ids if input_ids is not None else inputs_embeds
    if not isinstance(inputs, Tensor):
        raise ArgumentError(f"inputs are {type(inputs).__name__}: give a tensor (return_tensors='pt')")
    name, dims = ("input_ids", 2) if input_ids is not None else ("inputs_embeds", 3)
    if inputs.ndim != dims or inputs.numel() == 0:
        raise ArgumentError(f"{name} of shape {tuple(inputs.shape)} must have {dims} dimensions and be non-empty")
    if num_positions is not None and past + inputs.shape[1] > num_positions:
        raise ArgumentError(
            f"{past + inputs.shape[1]} tokens are more than the {num_positions} positions that this model has learned: "
            "shorten the text or generate fewer tokens"
        )
    inputs = inputs.cpu()
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


def refuse_forward_arguments(model: PreTrainedModel, arguments: Mapping[str, Any], past_key_values: object) -> None:
    """Refuse by name what has no sharded counterpart.

    Raises
    ------
    UnsupportedOperationError
        For an argument that transformers knows.
    ArgumentError
        For one that it doesn't.
    """
    if past_key_values is not None and not isinstance(past_key_values, ShardedCache):
        raise UnsupportedOperationError(
            f"past_key_values is a {type(past_key_values).__name__}: a sharded model keeps its KV in the workers; "
            "pass None, then what the model returned"
        )
    for name, value in arguments.items():
        wanted = value or (value is None and getattr(model.config, name, False) is True and name.startswith("output_"))
        if value is None and not wanted:
            continue
        if value is False and name.startswith("output_"):
            continue
        known = name in TransformersKwargs.__optional_keys__ or any(
            name in inspect.signature(base.forward).parameters
            for base in type(model).__mro__
            if issubclass(base, PreTrainedModel) and "forward" in vars(base)
        )
        if known or name.startswith("output_"):
            raise UnsupportedOperationError(f"{name} is not supported by a sharded model: leave it out")
        raise ArgumentError(f"unknown argument {name!r} of forward")

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
            if position_ids.is_floating_point() or int(position_ids.min()) < 0:
                raise ArgumentError("position_ids of a model that has learned its positions must be integers from 0 on")
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


def check_inputs(input_ids: object, inputs_embeds: object, vocabulary: int, width: int) -> Tensor:
    """Return the ids or the embeddings, on the CPU, once they are known to be usable.

    Parameters
    ----------
    input_ids : Tensor or None
        Integers ``[rows, tokens]``.
    inputs_embeds : Tensor or None
        Floating, ``[rows, tokens, width]``.
    vocabulary, width : int
        Rows and columns of the embedding.

    Raises
    ------
    ArgumentError
        If both or neither is given, the shape is wrong or empty, or an id is outside the vocabulary.
    UnsupportedOperationError
        If gradients are asked for.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError("give input_ids or inputs_embeds, one of them")
    if input_ids is not None:
        return _check_ids(check_tensor("input_ids", input_ids), vocabulary)
    embeddings = check_tensor("inputs_embeds", inputs_embeds)
    if embeddings.ndim != 3 or embeddings.numel() == 0 or embeddings.shape[2] != width:
        raise ArgumentError(
            f"inputs_embeds of shape {tuple(embeddings.shape)} must be [rows, tokens, {width}], not empty"
        )
    if not embeddings.is_floating_point():
        raise ArgumentError(f"inputs_embeds have dtype {embeddings.dtype}: embeddings are floating-point numbers")
    return embeddings


def _check_ids(ids: Tensor, vocabulary: int) -> Tensor:
    if ids.ndim != 2 or ids.numel() == 0:
        raise ArgumentError(f"input_ids of shape {tuple(ids.shape)} must have 2 dimensions and be non-empty")
    if ids.is_floating_point() or ids.is_complex():
        raise ArgumentError(f"input_ids have dtype {ids.dtype}: ids are integers")
    ids = ids.long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ArgumentError(
            f"input_ids range from {low} to {high}, the vocabulary from 0 to {vocabulary - 1}: "
            "is this the model's own tokenizer?"
        )
    return ids


def check_tensor(name: str, value: object) -> Tensor:
    """Return a tensor on the CPU, apart from gradients.

    Raises
    ------
    UnsupportedOperationError
        For masks per kind of layer, which transformers takes as a dict; if gradients are asked for.
    ArgumentError
        If it is something else, or has no data, or is sparse.
    """
    if isinstance(value, Mapping):
        raise UnsupportedOperationError(f"{name} as a mapping is not supported by a sharded model: give one tensor")
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} is a {type(value).__name__}: give a tensor (return_tensors='pt')")
    if value.is_meta:
        raise ArgumentError(f"{name} is on the meta device, which holds no data: make it on model.device, the CPU")
    if value.layout is not torch.strided:
        raise ArgumentError(f"{name} has layout {value.layout}: give a dense tensor, as to_dense() makes")
    if value.requires_grad and torch.is_grad_enabled():
        raise UnsupportedOperationError(
            f"{name} require gradients, which do not flow through a sharded model: "
            "call it under torch.no_grad(), or detach them"
        )
    return value.detach().cpu()


_PROMPT = ("attention_mask", "input_ids", "inputs", "inputs_embeds", "position_ids")


def check_prompt(ids: object, arguments: Mapping[str, Any]) -> None:
    """Check what ``generate`` is to go on from, before transformers computes with it.

    Parameters
    ----------
    ids : object
        Token ids, by whichever name they were given.
    arguments : mapping of str to object
        Of ``generate``.

    Raises
    ------
    ArgumentError
        If it is no tensor, or one without data, or ids have the wrong number of dimensions or are empty.
    """
    with torch.no_grad():  # as within generate
        for name, value in {"input_ids": ids, **arguments}.items():
            if (name in _PROMPT and value is not None) or isinstance(value, Tensor):
                check_tensor(name, value)
    if isinstance(ids, Tensor) and arguments.get("inputs_embeds") is None:
        if ids.ndim != 2 and not ids.is_floating_point():
            raise ArgumentError(f"input_ids of shape {tuple(ids.shape)} must have 2 dimensions")
        if ids.numel() == 0:
            raise ArgumentError(f"input_ids of shape {tuple(ids.shape)} are empty: give at least one token")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The shape that a step's tensors must fit.

    Parameters
    ----------
    rows, past, new : int
        Rows of the batch, tokens of each that are held, and new ones of each.
    heads : int or None
        Attention heads, if known.
    window : int or None
        Tokens that the model's narrowest sliding layer sees, if it has such.
    """

    rows: int
    past: int
    new: int
    heads: int | None = None
    window: int | None = None

    def check_mask(self, value: object) -> Tensor | None:
        """Return the attention mask on the CPU: of two dimensions, or of four that broadcast.

        Raises
        ------
        ArgumentError, UnsupportedOperationError
            If it is no tensor, or one of another shape.
        """
        if value is None:
            return None
        mask = check_tensor("attention_mask", value)
        seen = self.past + self.new
        if mask.ndim == 4:
            full = (self.rows, self.heads or mask.shape[1], self.new, seen)
            windowed = seen if self.window is None else min(self.past, self.window - 1) + self.new
            fits = all(size in (1, whole) for size, whole in zip(mask.shape[:3], full, strict=False))
            fits = fits and mask.shape[3] in (1, seen, windowed)
            if not fits:
                raise ArgumentError(f"attention_mask of shape {tuple(mask.shape)} must be {full}, 1 for any of them")
        elif mask.shape != (self.rows, seen):
            raise ArgumentError(
                f"attention_mask of shape {tuple(mask.shape)} must be {(self.rows, seen)}: rows x tokens held and new"
            )
        return mask

    def check_positions(self, value: object) -> Tensor | None:
        """Return the position ids on the CPU, of one row or of each, for one token or for each.

        Raises
        ------
        ArgumentError
            If they are no tensor, or one of another shape.
        """
        if value is None:
            return None
        positions = check_tensor("position_ids", value)
        if positions.ndim != 2 or positions.shape[0] not in (1, self.rows) or positions.shape[1] not in (1, self.new):
            raise ArgumentError(
                f"position_ids of shape {tuple(positions.shape)} must be {(self.rows, self.new)}, 1 for any of them"
            )
        return positions

    def check_cache_position(self, value: object) -> None:
        """Accept the positions in the KV cache that the new tokens take anyway, as older decoding loops pass them.

        Raises
        ------
        ArgumentError
            If they are no tensor.
        UnsupportedOperationError
            If they are others.
        """
        if value is None:
            return
        told = check_tensor("cache_position", value)
        taken = torch.arange(self.past, self.past + self.new)
        if told.shape != taken.shape or not torch.equal(told.long(), taken):
            raise UnsupportedOperationError(
                f"cache_position={told.tolist()} is not supported by a sharded model: new tokens follow those held, "
                f"from {self.past} to {self.past + self.new - 1} here; leave it out"
            )

    def check_labels(self, labels: Tensor, keep: int | Tensor, vocabulary: int, ignored: int) -> None:
        """Check that there is one label for each position whose logits are kept.

        Raises
        ------
        ArgumentError
            If they are no integers, there are too many or too few, or one is outside the vocabulary.
        """
        if labels.is_floating_point() or labels.is_complex():
            raise ArgumentError(f"labels have dtype {labels.dtype}: labels are integers")
        kept = len(range(self.new)[slice(-keep, None)]) if isinstance(keep, int) else None
        if kept is not None and labels.numel() != self.rows * kept:
            raise ArgumentError(
                f"labels of shape {tuple(labels.shape)} do not fit the logits of {count_text(self.rows, 'row')} x "
                f"{count_text(kept, 'token')}: "
                "give one for each, and leave logits_to_keep out"
            )
        counted = labels[labels != ignored]
        if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < vocabulary):
            raise ArgumentError(
                f"labels range from {int(counted.min())} to {int(counted.max())}, the vocabulary from 0 to "
                f"{vocabulary - 1}: what does not count is labelled {ignored} (ignore_index)"
            )


def check_logits_to_keep(value: object) -> int | Tensor:
    """Return a number of positions, or their indices on the CPU.

    Raises
    ------
    ArgumentError
        If it is neither an integer nor a tensor.
    """
    if isinstance(value, Tensor):
        return check_tensor("logits_to_keep", value)
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

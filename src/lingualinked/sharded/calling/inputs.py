"""Checks what a user passes to ``forward`` before anything is sent.

Knows shapes and ranges; computes nothing.
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
from lingualinked.model.cutting.parts import learned_positions
from lingualinked.model.hf_internals.recording import selected_hidden_states
from lingualinked.quantities import count_text

_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """The number of positions that a model has learned embeddings for."""

    num_positions: int
    counted_in_mask: bool  # whether the model derives positions from the attention mask; else it counts padding too

    @classmethod
    def of(cls, meta: PreTrainedModel) -> LearnedPositions | None:
        """Inspect a model on the meta device; ``None`` if its positions are computed (rotary, ALiBi)."""
        num_positions = learned_positions(meta)
        if num_positions is None:
            return None
        embeddings = [module for module in meta.modules() if isinstance(module, nn.Embedding)]
        counted = any("attention_mask" in inspect.signature(module.forward).parameters for module in embeddings)
        return cls(num_positions=num_positions, counted_in_mask=counted)

    def check(self, past: int, num_new: int, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Raise ArgumentError if a step would need more positions."""
        if position_ids is not None:
            if position_ids.is_floating_point() or int(position_ids.min()) < 0:
                raise ArgumentError("position_ids of a model with learned positions must be integers from 0")
            needed = int(position_ids.max()) + 1
        elif self.counted_in_mask and attention_mask is not None and attention_mask.ndim == 2:
            needed = int((attention_mask.cumsum(-1) * attention_mask)[:, past:].max())
        else:
            needed = past + num_new
        if needed > self.num_positions:
            raise ArgumentError(
                f"{needed:,} tokens exceed the {count_text(self.num_positions, 'position')} that this model has learned: "
                "shorten the text or generate fewer tokens"
            )


def check_inputs(input_ids: object, inputs_embeds: object, vocabulary: int, width: int) -> Tensor:
    """Check ids ``[rows, tokens]`` or embeddings ``[rows, tokens, width]``; return them on the CPU, in the user's graph."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError("give exactly one: input_ids or inputs_embeds")
    if input_ids is not None:
        return _check_ids(check_tensor("input_ids", input_ids), vocabulary)
    embeddings = check_tensor("inputs_embeds", inputs_embeds, takes_gradients=True)
    if embeddings.ndim != 3 or embeddings.numel() == 0 or embeddings.shape[2] != width:
        raise ArgumentError(
            f"inputs_embeds of shape {tuple(embeddings.shape)} must be [rows, tokens, {width}] and non-empty"
        )
    if not embeddings.is_floating_point():
        raise ArgumentError(f"inputs_embeds have dtype {embeddings.dtype}: embeddings must be floating-point numbers")
    return embeddings


def _check_ids(ids: Tensor, vocabulary: int) -> Tensor:
    if ids.ndim != 2 or ids.numel() == 0:
        raise ArgumentError(f"input_ids of shape {tuple(ids.shape)} must have 2 dimensions and be non-empty")
    if ids.is_floating_point() or ids.is_complex():
        raise ArgumentError(f"input_ids have dtype {ids.dtype}: ids must be integers")
    ids = ids.long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ArgumentError(
            f"input_ids range from {low} to {high}, but the vocabulary from 0 to {vocabulary - 1}: "
            "use the model's own tokenizer"
        )
    return ids


def check_tensor(name: str, value: object, *, takes_gradients: bool = False) -> Tensor:
    """Check that a value is a dense tensor with data, and return it on the CPU; refuse gradients of it, unless they are taken."""
    if isinstance(value, Mapping):
        raise UnsupportedOperationError(f"{name} as a mapping is not supported by a sharded model: give one tensor")
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} is a {type(value).__name__}: give a tensor (return_tensors='pt')")
    if value.is_meta:
        raise ArgumentError(f"{name} is on the meta device, which holds no data: create it on model.device, the CPU")
    if value.layout is not torch.strided:
        raise ArgumentError(f"{name} has layout {value.layout}: give a dense tensor (to_dense())")
    if value.requires_grad and torch.is_grad_enabled():
        if takes_gradients:
            return value.cpu()
        raise UnsupportedOperationError(
            f"{name} requires gradients, which flow through a sharded model to inputs_embeds and to what hooks return: "
            "call the model under torch.no_grad(), or detach the tensor"
        )
    return value.detach().cpu()


_PROMPT = ("attention_mask", "input_ids", "inputs", "inputs_embeds", "position_ids")


def check_prompt(ids: object, arguments: Mapping[str, Any]) -> None:
    """Check the prompt of ``generate``, ids under any name or embeddings, before transformers computes with it."""
    with torch.no_grad():  # as in generate
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
    """The shape that the tensors of a step must have."""

    rows: int
    past: int  # tokens per row in the KV cache
    new: int  # tokens per row
    heads: int | None = None  # of attention, if known
    window: int | None = None  # tokens that the narrowest sliding layer sees; None without one
    max_cache_len: int = 0  # tokens per row that a static KV cache holds; 0: it grows
    sees_pictures: bool = False  # whether the model's positions may have more dimensions

    def check_mask(self, value: object) -> Tensor | None:
        """Check an attention mask of two dimensions, or of four that broadcast, and return it on the CPU."""
        if value is None:
            return None
        mask = check_tensor("attention_mask", value)
        seen = self.past + self.new
        if mask.ndim == 4:
            full = (self.rows, self.heads or mask.shape[1], self.new, self.max_cache_len or seen)
            fits = all(size in (1, whole) for size, whole in zip(mask.shape[:3], full, strict=False))
            fits = fits and mask.shape[3] in (1, full[3], self._windowed)
            if not fits:
                raise ArgumentError(
                    f"attention_mask of shape {tuple(mask.shape)} must be {full}; any dimension may be 1"
                )
        elif mask.ndim != 2 or len(mask) != self.rows or mask.shape[1] not in (seen, self.max_cache_len or seen):
            raise ArgumentError(
                f"attention_mask of shape {tuple(mask.shape)} must be {(self.rows, seen)}: rows x (past + new tokens)"
                + (f", or {(self.rows, self.max_cache_len)}: rows x max_cache_len" if self.max_cache_len else "")
            )
        return mask

    @property
    def _windowed(self) -> int:
        """Tokens that the narrowest sliding layer attends to."""
        seen = self.past + self.new
        if self.window is None:
            return self.max_cache_len or seen
        window = min(self.window, self.max_cache_len or self.window)
        return window if self.max_cache_len and seen <= window else min(self.past, window - 1) + self.new

    def check_positions(self, value: object) -> Tensor | None:
        """Check position ids, whose last two dimensions may each be 1, and return them on the CPU.

        Those of models that see pictures may have one more in front, for the text, time, height and width.
        """
        if value is None:
            return None
        positions = check_tensor("position_ids", value)
        sizes = positions.shape[-2:]
        has_due_dims = positions.ndim == 2 or (self.sees_pictures and positions.ndim == 3)
        if not has_due_dims or sizes[0] not in (1, self.rows) or sizes[1] not in (1, self.new):
            raise ArgumentError(
                f"position_ids of shape {tuple(positions.shape)} must be {(self.rows, self.new)}; any dimension may be 1"
            )
        return positions

    def check_cache_position(self, value: object) -> None:
        """Check that ``cache_position``, from older decoding loops, holds the positions that the new tokens take anyway."""
        if value is None:
            return
        given = check_tensor("cache_position", value)
        expected = torch.arange(self.past, self.past + self.new)
        if given.shape != expected.shape or not torch.equal(given.long(), expected):
            raise UnsupportedOperationError(
                f"cache_position={given.tolist()} is not supported by a sharded model: new tokens follow those in the KV cache, "
                f"here from {self.past} to {self.past + self.new - 1}; leave it out"
            )

    def check_labels(self, labels: Tensor, keep: int | Tensor, vocabulary: int, ignored: int) -> None:
        """Check that there is one label for each position whose logits are kept."""
        if labels.is_floating_point() or labels.is_complex():
            raise ArgumentError(f"labels have dtype {labels.dtype}: labels must be integers")
        kept = len(range(self.new)[slice(-keep, None)]) if isinstance(keep, int) else None
        if kept is not None and labels.numel() != self.rows * kept:
            raise ArgumentError(
                f"labels of shape {tuple(labels.shape)} do not fit the logits of {count_text(self.rows, 'row')} x "
                f"{count_text(kept, 'token')}: "
                "give one label per position, and leave logits_to_keep out"
            )
        counted = labels[labels != ignored]
        if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < vocabulary):
            raise ArgumentError(
                f"labels range from {int(counted.min())} to {int(counted.max())}, but the vocabulary from 0 to "
                f"{vocabulary - 1}: use {ignored} (ignore_index) for positions without a label"
            )


def check_logits_to_keep(value: object) -> int | Tensor:
    """Check ``logits_to_keep``: a number of positions, or their indices, which are returned on the CPU."""
    if isinstance(value, Tensor):
        return check_tensor("logits_to_keep", value)
    try:
        return int(operator.index(value))  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(f"logits_to_keep={value!r} must be an integer or a tensor of indices") from None


def take_records(
    config: PreTrainedConfig, arguments: dict[str, Any], recordable: Collection[str], num_layers: int
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Remove from the arguments what asks for outputs of layers; return what they ask for, or the config if they do not.

    The second result are the indices of the hidden states that are asked for, or None for all.

    ``recordable`` is what transformers records by hooks, for which None means False; for a class's own code, as the config says.
    """
    asked: list[str] = []
    selected: tuple[int, ...] | None = None
    for name in _RECORDED:
        kind = name.removeprefix("output_")
        if kind == "router_logits" and kind not in recordable:
            continue  # refused with the other arguments that the class does not have
        by_config = getattr(config, name, False)
        value = arguments.pop(name, by_config)
        if value is None and (not recordable or kind == "router_logits"):
            value = by_config
        if kind == "hidden_states" and recordable:
            selected = selected_hidden_states(value, num_layers + 1)
        if value:
            asked.append(kind)
    return tuple(asked), selected


def refuse_arguments(arguments: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse by name the arguments that `ShardedCausalLM.forward` does not name.

    ``known`` are the parameters of the model's own ``forward``.
    """
    for name, value in arguments.items():
        if value is None or (value is False and name in _RECORDED):
            continue
        if name in known or name in TransformersKwargs.__optional_keys__:
            raise UnsupportedOperationError(f"{name} is not supported by a sharded model: leave it out")
        raise ArgumentError(f"unknown argument {name!r} of forward")

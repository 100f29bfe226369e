"""Encodes a step's attention mask and position ids in a few bytes, whatever the length of the text.

Sender and receiver keep the same state, so that a decode step sends neither tensor. Knows no sockets and no model.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lingualinked.errors import ArgumentError
from lingualinked.quantities import count_text

SOURCE = "encoder_hidden_states"
"""The further argument of a decoder of which stages keep the KV: what the encoder has made of the source, [rows, tokens, hidden]."""

SOURCE_MASK = "encoder_attention_mask"
"""The further argument of a decoder that stages keep for later steps."""


class MaskMode(enum.IntEnum):
    """How a step's attention mask is sent: there is none, as the last mask extended by ones, or in full."""

    NONE = 0
    EXTEND = 1
    FULL = 2


class PositionMode(enum.IntEnum):
    """How a step's position ids are sent: there are none, as consecutive, as counted in the mask, in full, or as the next ones.

    The next ones follow those of the step before, which were sent in full or were themselves the next ones, one by one in
    every row and dimension.
    """

    NONE = 0
    RANGE = 1
    FROM_MASK = 2
    FULL = 3
    NEXT = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ContextCode:
    """A step's mask and positions, encoded."""

    mask: MaskMode
    positions: PositionMode
    position_rows: int  # 1, or the batch
    tensors: tuple[Tensor, ...]  # the mask if `MaskMode.FULL`, then the positions if `PositionMode.FULL`


class StepContext:
    """What one session has seen of masks, positions and tokens; the caller and every stage keep the same state."""

    def __init__(
        self,
        mask: Tensor | None = None,
        num_tokens: int = 0,
        last_positions: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> None:
        self.mask = mask  # of the whole text, if there is one that can be extended
        self.num_tokens = num_tokens  # seen so far
        self.last_positions = last_positions  # [..., rows or 1, 1], of the last token, if they were sent in full
        self.source_mask = (
            source_mask  # [rows, source tokens], of what an encoder has read, if there is one; stages keep it
        )

    def encode(self, mask: Tensor | None, positions: Tensor | None, num_new: int) -> ContextCode:
        """Encode a step's mask and positions, and record them as seen; `decode` at the other end returns equal tensors.

        The mask is usually int64 ``[rows, past + num_new]``, the positions are int64 ``[1 or rows, num_new]``, or
        ``[dimensions, 1 or rows, num_new]`` where pictures have positions in time, height and width.
        """
        tensors: list[Tensor] = []
        mask_mode = MaskMode.NONE
        if mask is not None:
            extended = self._extended(num_new)
            if extended is not None and extended.dtype == mask.dtype and torch.equal(extended, mask):
                mask_mode = MaskMode.EXTEND
            else:
                mask_mode = MaskMode.FULL
                tensors.append(mask)
        position_mode, position_rows = PositionMode.NONE, 0
        if positions is not None:
            position_rows = positions.shape[-2]
            if _is_equal(positions, self._consecutive(position_rows, num_new)):
                position_mode = PositionMode.RANGE
            elif mask is not None and _is_equal(positions, _counted(mask, num_new)):
                position_mode = PositionMode.FROM_MASK
            elif _is_equal(positions, self._next_positions(num_new)):
                position_mode = PositionMode.NEXT
            else:
                position_mode = PositionMode.FULL
                tensors.append(positions)
        self._record_positions(position_mode, positions)
        self._record_seen(mask, num_new)
        return ContextCode(mask=mask_mode, positions=position_mode, position_rows=position_rows, tensors=tuple(tensors))

    def decode(self, code: ContextCode, num_new: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the mask and positions that `encode` was given, and record them as seen; raise ValueError for others."""
        tensors = list(code.tensors)
        if len(tensors) != (code.mask is MaskMode.FULL) + (code.positions is PositionMode.FULL):
            raise ValueError("the tensors of a step do not match the announced mask and positions")
        mask: Tensor | None = None
        if code.mask is MaskMode.FULL:
            mask = tensors.pop(0)
        elif code.mask is MaskMode.EXTEND:
            mask = self._extended(num_new)
            if mask is None:
                raise ValueError("a step extends a mask that this session does not have")
        positions: Tensor | None = None
        if code.positions is PositionMode.RANGE:
            positions = self._consecutive(code.position_rows, num_new)
        elif code.positions is PositionMode.FROM_MASK:
            if mask is None:
                raise ValueError("a step counts positions in a mask, and has no mask")
            positions = _counted(mask, num_new)
        elif code.positions is PositionMode.NEXT:
            positions = self._next_positions(num_new)
            if positions is None or positions.shape[-2] != code.position_rows:
                raise ValueError("a step's positions follow others that this session does not have")
        elif code.positions is PositionMode.FULL:
            positions = tensors.pop(0)
            if positions.ndim < 2:
                raise ValueError("the positions of a step have no rows")
        self._record_positions(code.positions, positions)
        self._record_seen(mask, num_new)
        return mask, positions

    def extend(self, num_tokens: int, positions: PositionMode) -> None:
        """Record tokens as seen, one in each step, whose masks extend the last one by ones."""
        if not num_tokens:
            return
        self._record_positions(positions, self._next_positions(num_tokens))
        self._record_seen(self._extended(num_tokens), num_tokens)

    def copy(self, num_tokens: int) -> StepContext:
        """Return the state after the first ``num_tokens`` tokens; raise ArgumentError if there are fewer."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ArgumentError(f"can't copy {num_tokens} of {count_text(self.num_tokens, 'token')}")
        mask = None if self.mask is None else self.mask[..., : self.mask.shape[-1] - (self.num_tokens - num_tokens)]
        positions = self.last_positions if num_tokens == self.num_tokens else None
        return StepContext(mask, num_tokens, positions, self.source_mask)

    def keep_source(self, extras: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the further arguments of a step, with the mask of the source that came with an earlier one."""
        if SOURCE_MASK in extras:
            self.source_mask = extras[SOURCE_MASK]
        return extras if self.source_mask is None else {**extras, SOURCE_MASK: self.source_mask}

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows ``rows`` (int64 ``[new rows]``) of the mask and positions, as beam search does with the KV cache."""
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)
        if self.source_mask is not None:
            self.source_mask = self.source_mask.index_select(0, rows)
        if self.last_positions is not None and self.last_positions.shape[-2] > 1:
            self.last_positions = self.last_positions.index_select(-2, rows)

    def join_rows(self, others: Sequence[StepContext]) -> StepContext:
        """Return the state of a session of these rows and those of others, which have seen as many tokens."""
        masks = _joined([each.mask for each in (self, *others)])
        source_masks = _joined([each.source_mask for each in (self, *others)])
        return StepContext(masks, self.num_tokens, source_mask=source_masks)

    def crop(self, num_tokens: int) -> None:
        """Remove the last ``num_tokens`` tokens."""
        self.num_tokens -= num_tokens
        if num_tokens:
            self.last_positions = None
            self.mask = None if self.mask is None else self.mask[..., :-num_tokens]

    def _extended(self, num_new: int) -> Tensor | None:
        if self.mask is None:
            return None
        return torch.cat([self.mask, self.mask.new_ones((*self.mask.shape[:-1], num_new))], dim=-1)

    def _consecutive(self, num_rows: int, num_new: int) -> Tensor:
        positions = torch.arange(self.num_tokens, self.num_tokens + num_new, dtype=torch.long)
        return positions.unsqueeze(0).expand(num_rows, -1).contiguous()

    def _next_positions(self, num_new: int) -> Tensor | None:
        if self.last_positions is None:
            return None
        return self.last_positions + torch.arange(1, num_new + 1, dtype=self.last_positions.dtype)

    def _record_positions(self, mode: PositionMode, positions: Tensor | None) -> None:
        """Keep the last positions if the next ones may follow them: floating-point ones are not counted up."""
        is_kept = mode in (PositionMode.FULL, PositionMode.NEXT) and positions is not None
        self.last_positions = None
        if (
            is_kept
            and positions is not None
            and not positions.is_floating_point()
            and positions.dtype is not torch.bool
        ):
            self.last_positions = positions[..., -1:].clone()

    def _record_seen(self, mask: Tensor | None, num_new: int) -> None:
        self.num_tokens += num_new
        # Only a padding mask of the whole text can be extended by ones.
        fits = mask is not None and mask.ndim == 2 and mask.shape[-1] == self.num_tokens
        self.mask = mask if fits else None


def _joined(masks: Sequence[Tensor | None]) -> Tensor | None:
    known = [mask for mask in masks if mask is not None]
    return torch.cat(known) if len(known) == len(masks) else None


def _counted(mask: Tensor, num_new: int) -> Tensor | None:
    """Return the positions of the last ``num_new`` tokens as transformers counts them in a padding mask."""
    if mask.ndim != 2 or mask.is_floating_point():
        return None
    positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return positions[:, -num_new:].contiguous()


def _is_equal(left: Tensor, right: Tensor | None) -> bool:
    return right is not None and left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)

"""Which columns of a batch are text and which are padding, row by row, in the steps of a session.

Knows masks, positions and kept logits as transformers takes them; no sessions.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lingualinked.errors import UnsupportedOperationError
from lingualinked.quantities import count_text

_MODE = "batch_invariant=True"


@dataclasses.dataclass(frozen=True, slots=True)
class NewText:
    """What a step adds to one row."""

    columns: Tensor  # of the step's that are text, int64 [tokens]
    num_logits: int  # of the last of these, how many have logits
    kept: Tensor  # which of those are asked for, int64 [kept]
    places: Tensor  # of these among the kept columns of the step, int64 [kept]


class TextColumns:
    """Which columns of each row's KV are text; all others are padding, which is not computed."""

    def __init__(self, num_rows: int) -> None:
        self._is_text = torch.ones((num_rows, 0), dtype=torch.bool)

    @property
    def num_columns(self) -> int:
        """Columns of each row so far."""
        return self._is_text.shape[1]

    def add(
        self, num_new: int, mask: Tensor | None, positions: Tensor | None, logits_to_keep: int | Tensor
    ) -> list[NewText]:
        """Add a step's columns; return what is new in each row.

        Raises UnsupportedOperationError, and adds nothing, if mask or positions are not those of texts with padding, or logits of
        padding would be used.
        """
        past = self.num_columns
        whole = self._with_new(num_new, mask)
        is_new = whole[:, past:]
        _check_positions(whole, positions, num_new)
        kept = _kept_columns(num_new, logits_to_keep)
        last = int(kept[-1]) if isinstance(logits_to_keep, int) and logits_to_keep and len(kept) else None
        texts = []
        for row, is_text in enumerate(is_new):
            if last is not None and bool(is_text[: last + 1].any()) and not is_text[last]:
                raise UnsupportedOperationError(
                    f"row {row} ends with padding, whose logits {_MODE} does not compute: pad on the left (padding_side='left'), or leave "
                    "logits_to_keep out"
                )
            columns = is_text.nonzero().squeeze(1)
            (places,) = is_text[kept].nonzero(as_tuple=True)
            within = torch.searchsorted(columns, kept[places])
            num_logits = len(columns) - int(within.min()) if len(within) else 0
            texts.append(NewText(columns, num_logits, within - (len(columns) - num_logits), places))
        self._is_text = whole
        return texts

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows ``rows`` (int64 ``[new rows]``)."""
        self._is_text = self._is_text[rows]

    def crop(self, num_columns: int) -> list[int]:
        """Remove the last columns; return how many of each row are text."""
        kept, removed = self._is_text.tensor_split([self.num_columns - num_columns], dim=1)
        self._is_text = kept
        return [int(count) for count in removed.sum(1)]

    def copy(self) -> TextColumns:
        """Return a copy, to go on independently."""
        copied = TextColumns(0)
        copied._is_text = self._is_text
        return copied

    def _with_new(self, num_new: int, mask: Tensor | None) -> Tensor:
        """Return which columns are text with those of a step, and check its mask."""
        num_rows, past = self._is_text.shape
        if mask is None:
            if not bool(self._is_text.all()):
                raise UnsupportedOperationError(
                    f"{_MODE} does not attend to padding: pass the attention_mask of the whole text, as in the steps before"
                )
            return self._is_text.new_ones((num_rows, past + num_new))
        if mask.ndim != 2:
            raise UnsupportedOperationError(
                f"attention_mask of {count_text(mask.ndim, 'dimension')} with {_MODE}: pass one of two dimensions, in which padding is 0"
            )
        is_text = mask[:, : past + num_new] != 0
        if not torch.equal(is_text[:, :past], self._is_text):
            raise UnsupportedOperationError(
                f"attention_mask hides other tokens than in the steps before, whose KV {_MODE} holds without padding: pass the same "
                "mask, extended"
            )
        return is_text


def _check_positions(is_text: Tensor, positions: Tensor | None, num_new: int) -> None:
    """Refuse positions other than those that count the text of each row."""
    is_new = is_text[:, -num_new:]
    counted = (is_text.cumsum(1) - 1)[:, -num_new:]
    if positions is None:
        first = is_text.shape[1] - num_new
        given, named = torch.arange(first, first + num_new), "position_ids=None counts padding"
    else:
        given, named = positions, "position_ids do not count the tokens of each row from 0, without padding"
    if not torch.equal(given.expand(is_new.shape)[is_new], counted[is_new]):
        raise UnsupportedOperationError(
            f"{named}, which {_MODE} leaves out: pass position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0), of the new tokens"
        )


def _kept_columns(num_new: int, logits_to_keep: int | Tensor) -> Tensor:
    """Return the columns of a step whose logits are asked for, in order."""
    if isinstance(logits_to_keep, int):
        return torch.arange(num_new)[-logits_to_keep:]
    if logits_to_keep.ndim != 1:
        raise UnsupportedOperationError(
            f"logits_to_keep of {count_text(logits_to_keep.ndim, 'dimension')} with {_MODE}: pass a number, or indices of one dimension"
        )
    return torch.arange(num_new)[logits_to_keep]

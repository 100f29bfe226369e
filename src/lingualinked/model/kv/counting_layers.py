"""Layers of growing KV caches in place of those held elsewhere, of every kind that transformers has: they count, and keep nothing.

Each is of a subclass of the real layer's class, so that it answers what a model asks. Knows no stages and no sessions.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from lingualinked.model.hf_internals.cache_layers import subclass_of


class Counting:
    """Base of the classes of such layers: lengths and mask sizes follow from the number of tokens seen."""

    cumulative_length: int
    is_initialized: bool
    keys: Tensor | None
    values: Tensor | None
    has_previous_state: dict[int, bool]

    def advance(self, num_tokens: int) -> None:
        """Count tokens that the real layer has seen."""
        self.cumulative_length += num_tokens
        self.is_initialized = True
        if vars(self).get("keys", self) is None:  # some models ask whether there are any
            self.keys = self.values = torch.empty(0)
        if hasattr(self, "has_previous_state"):
            self.has_previous_state = dict.fromkeys(self.has_previous_state, True)

    def drop_last(self, num_tokens: int) -> None:
        """Count fewer tokens."""
        self.cumulative_length = max(0, self.cumulative_length - num_tokens)

    def get_seq_length(self) -> int:
        """Return the number of tokens counted."""
        return self.cumulative_length

    def reorder_cache(self, beam_idx: Any) -> None:
        """Do nothing: there are no rows."""

    def update(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise: what a layer held elsewhere keeps is written there."""
        raise AssertionError(f"{type(self).__name__} is in place of a layer held elsewhere, and was written to")

    update_conv_state = update_recurrent_state = update_indexer = lazy_initialization = update


def counting_layer(kind: Any) -> Any:
    """Make the layer in place of one of transformers' that has seen nothing, and is of no further use."""
    made = subclass_of(Counting, type(kind))
    layer = object.__new__(made)
    vars(layer).update(vars(kind), cumulative_length=0, is_initialized=False)
    return layer

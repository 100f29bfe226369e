"""Layers that a stage owns of the kinds beside full and sliding attention: transformers' own, whose state is taken as a whole.

State-space and linear attention, compressed and indexed keys, hybrids of them. Knows no stages and no sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.model.hf_internals.cache_layers import subclass_of
from lingualinked.model.kv.layer_state import (
    Path,
    Plain,
    State,
    num_bytes,
    on_meta,
    read_state,
    rebuilt,
    set_at,
    tensors_of,
    write_state,
)
from lingualinked.quantities import count_text

_MANY_ROWS = 104_729  # by which a dimension of rows is told from others
_OWN = ("version",)  # each holder counts its own changes


class WholeLayer:
    """Base of the classes of such layers, before transformers' own."""

    num_seen: int  # tokens, padding too
    version: int  # of the state: another number after each change

    if TYPE_CHECKING:

        def crop(self, tokens_to_remove: int) -> None: ...  # noqa: D102

    @property
    def stop(self) -> int:
        """Position in the text after the last token seen."""
        return self.num_seen

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return num_bytes(tensors_of(self))

    @property
    def num_rows(self) -> int:
        """Number of rows held."""
        tensors = tensors_of(self)
        return next((tensors[path].shape[dim] for path, dim in self._row_dims().items()), 0)

    def record_step(self, num_tokens: int) -> None:
        """Count the tokens of a step."""
        self.num_seen += num_tokens
        self.version += 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows with the indices `beam_idx`, in this order."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.version += 1

    def append_rows(self, others: Sequence[Self]) -> None:
        """Append the rows of layers that have seen as many tokens of other rows; raise ProtocolError if they can't be joined."""
        held = [tensors_of(each) for each in (self, *others)]
        dims = self._row_dims()
        if any(_without_tensors(each) != _without_tensors(self) for each in others) or not all(
            torch.equal(value, each[path]) for path, value in held[0].items() if path not in dims for each in held[1:]
        ):
            raise ProtocolError(f"rows of a {self!r} can't be joined: their states are at different places")
        for path, dim in dims.items():
            set_at(self, path, torch.cat([each[path] for each in held], dim=dim))
        self.version += 1

    def copy(self, num_dropped: int = 0) -> Self:
        """Return an independent layer with copies of the same tensors, less the last `num_dropped` tokens."""
        copied = type(self).__new__(type(self))
        vars(copied).update(rebuilt(vars(self), torch.clone))
        if num_dropped:
            copied.drop_last(num_dropped)
        return copied

    def drop_last(self, num_tokens: int) -> None:
        """Remove tokens at the end, and what was recorded of the past, as the class does."""
        if self.num_seen:
            self.crop(-num_tokens)
        self.num_seen = max(0, self.num_seen - num_tokens)
        self.version += 1

    def check_crop(self, num_tokens: int) -> None:
        """Raise ArgumentError if tokens at the end can't be removed from what the layer keeps."""
        if not self.num_seen:
            return
        refusal = None
        if num_tokens and not getattr(self, "is_croppable", True):
            refusal = "a recurrent state does not go back"
        else:
            try:
                on_meta(self).crop(-num_tokens)
            except (RuntimeError, TypeError, ValueError) as error:
                refusal = str(error)
        if refusal is not None:
            raise ArgumentError(
                f"can't crop a KV cache of {count_text(self.num_seen, 'token')}: of a layer ({self!r}), {refusal}"
            )

    def read_state(self) -> State:
        """Return the state, by paths with dots; tensors are valid until the next change."""
        return read_state(self, _OWN)

    def write_state(self, state: Mapping[str, Tensor | Plain], device: torch.device) -> None:
        """Replace the state by one that another layer of this class has read; raise ProtocolError if it is not one."""
        write_state(self, state, device)
        if self.num_seen < 0:
            raise ProtocolError(f"num_seen={self.num_seen} of a {self!r} is negative")
        self.version += 1

    def _row_dims(self) -> dict[Path, int]:
        """Return which dimension of each tensor counts rows: what the class's own reordering changes."""
        twin = on_meta(self)
        twin.reorder_cache(torch.zeros(_MANY_ROWS, dtype=torch.long, device="meta"))
        return {
            path: each.shape.index(_MANY_ROWS) for path, each in tensors_of(twin).items() if _MANY_ROWS in each.shape
        }


def whole_layer(kind: Any) -> Any:
    """Make the layer of a stage's own from one of transformers' that has seen nothing, and is of no further use."""
    made = subclass_of(WholeLayer, type(kind))
    layer = object.__new__(made)
    vars(layer).update(vars(kind), num_seen=0, version=0)
    return layer


def _without_tensors(layer: WholeLayer) -> State:
    return {name: "" if isinstance(value, Tensor) else value for name, value in layer.read_state().items()}

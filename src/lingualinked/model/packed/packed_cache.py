"""The KV caches of several texts, as one cache of transformers in a forward pass over all their new tokens.

Knows caches and places in the pass; neither attention nor masks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from transformers import Cache

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.kv.kept_values import KeptValues

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from lingualinked.model.kv.kv_cache import StageCache


@dataclasses.dataclass(frozen=True, slots=True)
class TextPlace:
    """Where the new tokens of one text are in the pass, ``[start, stop)``, and its KV cache."""

    start: int
    stop: int
    cache: StageCache

    @property
    def num_new(self) -> int:
        """Number of its new tokens."""
        return self.stop - self.start


class PackedCache:
    """What `Stage.step` takes as the KV cache of a pass over several texts; `hf` is what the model gets."""

    is_static = False
    is_plain = True
    own = None
    captured: dict[Any, Any]

    def __init__(self, places: Sequence[TextPlace]) -> None:
        self.places = places
        self.hf = self.given = PackedStates(places)
        self.num_tokens = min(place.cache.num_tokens for place in places)  # 0 if a text begins
        self.modules = KeptValues()

    def check_room(self, _num_tokens: int) -> None:
        """Check nothing: each text's room was checked before."""

    def advance(self, _num_tokens: int, skipped: Collection[int] = ()) -> None:
        """Count the tokens of a finished pass, in each text's cache."""
        self.hf.check_attended("")
        if self.modules:
            raise UnsupportedOperationError(
                f"packed steps are not possible: the model's modules keep something of each text ({min(self.modules.values)}); use "
                "ordinary steps"
            )
        for place in self.places:
            if place.cache.is_static:
                place.cache.count.end_step()
            place.cache.advance(place.num_new, skipped)

    def begin(self) -> None:
        """Prepare the texts' caches for a pass."""
        for place in self.places:
            if place.cache.is_static:
                place.cache.count.begin_step(place.num_new)


class PackedStates(Cache):
    """Takes the new keys and values of all texts; attention, which reads each text's (`take_layer`), adds them to its cache."""

    def __init__(self, places: Sequence[TextPlace]) -> None:
        super().__init__(layers=list(places[0].cache.hf.layers))  # for their types
        self.mask_layer = 0  # the layer whose lengths the mask in the making is for
        self._added: tuple[Tensor, Tensor, int] | None = None  # what attention has not read yet, and of which layer

    @property
    def is_compileable(self) -> bool:
        """Whether masks are always made, which each text's cache says for itself."""
        return False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values of all new tokens, ``[1, heads, tokens, dim]``, until attention takes them; return them."""
        self.check_attended(f", before layer {layer_idx}")
        self._added = key_states, value_states, layer_idx
        return key_states, value_states

    def take_layer(self, key: Tensor, value: Tensor) -> int:
        """Return the layer whose attention was given these keys and values of the new tokens, and has to add them."""
        if self._added is None or key is not self._added[0] or value is not self._added[1]:
            raise not_through_interface("it computes with other keys and values than the KV cache has returned")
        (_, _, layer), self._added = self._added, None
        return layer

    def check_attended(self, where: str) -> None:
        """Raise UnsupportedOperationError if keys were added that attention has not read through the interface."""
        if self._added is not None:
            self._added = None
            raise not_through_interface(f"one of them does not compute it through transformers' interface{where}")

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Note the layer, for whose lengths in each text's cache masks are made; the sizes are not used."""
        self.mask_layer = layer_idx
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_mask_sizes`."""
        self.mask_layer = layer_idx
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the texts have lengths of their own
        """Return 0: positions are given."""
        return 0


def not_through_interface(why: str) -> UnsupportedOperationError:
    """Make the error of a model whose attention can't be computed text by text."""
    return UnsupportedOperationError(
        f"packed steps need layers whose attention goes through transformers' AttentionInterface: {why}; use ordinary steps"
    )

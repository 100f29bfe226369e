"""Rotary embeddings that depend on how long a text is, in a pass over several texts: each text has its own.

Knows rotary embeddings and places in the pass; no layers and no stages.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lingualinked.model.hf_internals import computing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lingualinked.model.packed.packed_cache import TextPlace


@contextlib.contextmanager
def rotated_by_text(modules: Sequence[nn.Module], places: Sequence[TextPlace]) -> Iterator[None]:
    """Make these rotary embeddings rotate each text as if it were alone, within the context. Needs `GLOBAL_STATE`."""
    for module in modules:
        vars(module)["forward"] = _by_text(module, places)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


def _by_text(module: nn.Module, places: Sequence[TextPlace]) -> Any:
    ropes = computing.dynamic_ropes(module)

    def forward(states: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        parts = []
        replaced = vars(module).pop("forward")
        try:
            for place in places:
                for rope in ropes:
                    rope.stretch(max(place.cache.num_tokens, rope.unstretched), states.device)
                stop = position_ids.shape[1] if place is places[-1] else place.stop
                parts.append(module(states, position_ids[:, place.start : stop], *args, **kwargs))
        finally:
            vars(module)["forward"] = replaced
        return tuple(torch.cat(each, dim=1) for each in zip(*parts, strict=True))

    return forward

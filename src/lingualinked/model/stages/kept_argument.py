"""How the forward pass of a stage's model is told what has been kept of a text, and how it returns that.

Knows signatures and the KV cache of a session; no spans.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lingualinked.model.cutting.heads import cache_argument_of
from lingualinked.model.hf_internals.cache_arguments import masks_past, supports_cache
from lingualinked.model.kv.own_state import OwnState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lingualinked.model.cutting.cut import Boundary
    from lingualinked.model.kv.kv_cache import StageCache


class KeptArgument:
    """The argument of a model's forward pass; `keeps_own` says that it is an object of the model's own class.

    `keeps_any` says whether there is such an argument: without it, each step is of a whole text. `masks_past` says whether a mask is of the tokens before a step too.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int, boundary: Boundary) -> None:
        self._name = cache_argument_of(model)
        self.keeps_any = self._name is not None
        self._config, self._num_layers = model.config, num_layers
        # Of what is made on the fly, the class behind it.
        self._module = next(
            each.__module__ for each in type(model).__mro__ if each.__module__.startswith("transformers")
        )
        self.keeps_own = boundary.keeps_own = not supports_cache(type(model))
        self.masks_past = masks_past(type(model))

    def new_state(self) -> OwnState | None:
        """Return the place for an object of the model's own, of a new session."""
        return OwnState(self._config, sys.modules[self._module], self._num_layers) if self.keeps_own else None

    def arguments(self, cache: StageCache | None) -> dict[str, Any]:
        """Return the arguments by which the model gets what it has kept, and keeps more."""
        if self._name is None:
            return {}
        return {self._name: None if cache is None else cache.given, "use_cache": cache is not None}

    def keep(self, cache: StageCache | None, result: Any, num_rows: int) -> None:
        """Keep what a pass has returned, if that is an object of the model's own."""
        if cache is not None and cache.own is not None and result is not None:
            cache.own.keep(result.get(self._name), num_rows)

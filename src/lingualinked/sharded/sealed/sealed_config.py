"""Refuses changes to config fields that the stages were built from, since the stages would not follow.

Knows transformers' configs; nothing of modules or workers.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from lingualinked.errors import UnsupportedOperationError

# The fields that every config has are about outputs and tokens, and only the caller reads them; except these.
_OF_THE_STAGES = ("_attn_implementation_internal", "_experts_implementation_internal", "dtype")
_COMMON = vars(PreTrainedConfig()).keys() - set(_OF_THE_STAGES)
# Further fields that only the caller reads, for generation and loss, like those that end in "_token_id".
_OF_THE_CALLER = ("output_router_logits", "router_aux_loss_coef", "use_cache", "vocab_size")
_ABSENT = object()


class SealedConfig:
    """The model's config at the time when the stages were built."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._fields: dict[str, Any] = copy.deepcopy(vars(config))
        self._known = self._fields  # with the accepted changes

    def check(self, config: PreTrainedConfig) -> None:
        """Check that the fields that the stages were built from are unchanged."""
        fields = vars(config)
        if fields == self._known:
            return
        for name, built in self._fields.items():
            if name in _COMMON or name in _OF_THE_CALLER or name.endswith("_token_id"):
                continue
            value = fields.get(name, _ABSENT)
            if value is _ABSENT or value != built:
                shown = name.removesuffix("_internal")
                now = "deleted" if value is _ABSENT else f"{value!r} now"
                raise UnsupportedOperationError(
                    f"config.{shown} was {built!r} when the stages of this sharded model were built, and is {now}, which has "
                    f"no effect on them: set it back, or pass {shown.removeprefix('_')}= to ShardedModel.from_pretrained"
                )
        self._known = copy.deepcopy(fields)

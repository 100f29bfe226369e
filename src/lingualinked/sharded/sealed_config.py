"""The fields of a config that the stages were built from, which no longer follow it once they are.

Knows configs of transformers; nothing of modules or workers.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from lingualinked.errors import UnsupportedOperationError

# What every config has is about outputs and tokens, which are the caller's; but for these.
_OF_THE_STAGES = ("_attn_implementation_internal", "_experts_implementation_internal", "dtype")
_COMMON = vars(PreTrainedConfig()).keys() - set(_OF_THE_STAGES)
# Further fields that the caller alone reads, for generation and loss. Fields that end in "_token_id" are too.
_OF_THE_CALLER = ("output_router_logits", "router_aux_loss_coef", "use_cache", "vocab_size")
_ABSENT = object()


class SealedConfig:
    """A config as it was when the stages were built.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._fields: dict[str, Any] = copy.deepcopy(vars(config))
        self._known = self._fields  # with changes that the stages need not follow

    def check(self, config: PreTrainedConfig) -> None:
        """Check that a config still says what the stages were built from.

        Raises
        ------
        UnsupportedOperationError
            With the name and both values of a field that was changed.
        """
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
                    f"no effect on them: set it back, or give {shown.removeprefix('_')}= to ShardedModel.from_pretrained"
                )
        self._known = copy.deepcopy(fields)

"""Which models can run several texts in one pass, found out from their classes.

Knows models of transformers; no stages and no texts.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lingualinked.model.hf_internals import computing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lingualinked.model.cutting.model_parts import ModelParts

_IMPLEMENTATIONS = ("sdpa", "eager")


def why_not_packed(model: PreTrainedModel, parts: ModelParts) -> str:
    """Return why a model, which may lie on the meta device, can't run several texts in one pass; "" if it can.

    What a class does beyond that in its attention shows in the first pass, which is then refused.
    """
    name = type(model).__name__
    if parts.transmission.shortcuts or any(used and sum(used) > 1 for used in parts.transmission.items):
        return f"layers of {name} use more than the hidden states of the layer before"
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers} - {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }
    if kinds:
        return f"layers of {name} keep a {min(kind.__name__ for kind in kinds)}, which is not the KV of single tokens"
    if not computing.uses_interface(model):
        return f"the attention of {name} does not go through transformers' AttentionInterface"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return f"{name} takes no position_ids: it counts positions over all tokens"
    implementation = computing.attention_implementation(model)
    if implementation not in _IMPLEMENTATIONS:
        return f"attn_implementation={implementation!r} is none of {', '.join(map(repr, _IMPLEMENTATIONS))}"
    return ""

"""How ``generate`` turns pictures into what a model's forward takes in their place.

Knows methods of transformers' generation; no stages and no sessions.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

ENCODED = "mm_encoder_outputs"
"""The argument of a model's forward that stands for pictures which have been encoded before."""
_MODALITIES = ("image", "video")
_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")


def encoder_arguments(model: PreTrainedModel) -> dict[str, frozenset[str]]:
    """Return the arguments of the methods by which ``generate`` encodes pictures, by their modality."""
    base: Any = model.base_model
    methods = {
        each: getattr(base, f"get_{each}_features", None) for each in _MODALITIES if each in model.input_modalities
    }
    return {
        each: frozenset(inspect.signature(method).parameters) - {"kwargs"}
        for each, method in methods.items()
        if method is not None
    }


def holds_pictures(arguments: Mapping[str, Any]) -> bool:
    """Return whether arguments of ``generate``, or of a model's forward, hold pictures that are still to be encoded."""
    return any(arguments.get(name) is not None for name in _PIXELS)


def encode_pictures(
    model: Any, arguments: Mapping[str, Tensor], text: Tensor, num_copies: int
) -> dict[str, Tensor | Any]:
    """Encode pictures as ``generate`` does before the prompt; return the arguments of a forward pass with what they became.

    `text` are the ids or embeddings of all rows, of which each `num_copies` in sequence have the same pictures.
    """
    encoded: dict[str, Any] = model._prepare_multimodal_encoder_kwargs_for_generation(dict(arguments))
    if num_copies > 1:
        rows = text[::num_copies]
        ids, embeddings = (None, rows) if rows.is_floating_point() else (rows, None)
        encoded[ENCODED] = model._expand_multimodal_outputs(
            ids, encoded[ENCODED], expand_size=num_copies, inputs_embeds=embeddings
        )
    return encoded

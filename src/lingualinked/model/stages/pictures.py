"""What a stage does with further arguments of the model's forward: pictures, and what belongs to their tokens.

Knows the model of one stage; neither sessions nor where the arguments come from.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lingualinked.errors import ArgumentError, UncuttableModelError
from lingualinked.model.hf_internals.encoding import encode_pictures, holds_pictures
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from torch import nn

    from lingualinked.model.stages.stage_data import StageInputs

_OF_EVERY_STEP = frozenset(
    {
        "attention_mask",
        "input_ids",
        "inputs_embeds",
        "logits_to_keep",
        "past_key_values",
        "position_ids",
        "use_cache",
    }
)
_OF_EVERY_TEXT = frozenset({"attention_mask", "inputs_embeds", "position_ids"})


class StagePictures:
    """Further arguments of the forward of a stage that ends with layer `end`."""

    def __init__(self, model: Any, layers: str, end: int) -> None:
        self._model, self._end = model, end
        self._text_model: nn.Module = model.get_submodule(layers.rpartition(".")[0])
        self._num_layers = len(model.get_submodule(layers))
        self._names = frozenset(inspect.signature(model.forward).parameters) - _OF_EVERY_STEP

    def arguments(self, inputs: StageInputs, text: Tensor) -> dict[str, Any]:
        """Return the further arguments of a step, where the stage computes; pictures are encoded if that comes first."""
        unknown = inputs.extras.keys() - self._names
        if unknown:
            raise ArgumentError(f"{min(unknown)!r} is not a further argument of {type(self._model).__name__}.forward")
        given = {name: each.to(text.device) for name, each in inputs.extras.items()}
        if not inputs.picture_copies or not holds_pictures(given):
            return given
        return encode_pictures(self._model, given, text, inputs.picture_copies)

    @contextlib.contextmanager
    def checked(self, inputs: StageInputs) -> Iterator[None]:
        """Raise, in this context, if later stages would need what became of pictures between their layers, since they lack it."""
        if not holds_pictures(inputs.extras) or self._end == self._num_layers:
            yield
            return
        hook = self._text_model.register_forward_pre_hook(self._check_text, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _check_text(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        for name, value in kwargs.items():
            if name in _OF_EVERY_TEXT or next(_floats(value), None) is None:
                continue
            depth = len(value) if isinstance(value, (list, tuple)) else self._num_layers
            if depth >= self._end:
                raise UncuttableModelError(
                    type(self._model).__name__,
                    f"{name}, made of pictures, is used between the first {count_text(depth, 'layer')}, and the first stage "
                    f"ends with layer {self._end}: give it more layers",
                )


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _floats(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _floats(each)

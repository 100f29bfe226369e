"""The tensors that one stage makes for later ones, or uses of earlier ones, beside its input and output.

Knows the modules of one stage; neither sockets nor where other stages are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingualinked.model.hooks.hook_points import in_this_thread
from lingualinked.transmission import INPUT_IDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lingualinked.model.cutting.model_parts import ModelParts


class StageShortcuts:
    """The shortcuts that the stage of layers ``[start, end)`` makes, and what it is called with in place of ids that it lacks."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, parts: ModelParts, start: int, end: int) -> None:
        made = [
            each
            for each in parts.transmission.shortcuts
            if start <= each.made_at < end < parts.num_layers and each.used_at[-1] >= end
        ]
        self.cross = bool(made or parts.shortcuts_to(start, end))  # whether it makes some, or uses some
        self._is_first = start == 0
        self._needs_ids = INPUT_IDS in parts.shortcuts_to(start, end)
        self._gives_ids = any(each.is_ids for each in made)
        self._words: Any = model.get_input_embeddings()  # type: ignore[operator]
        words: Tensor | None = getattr(self._words, "weight", None)
        self._word_like = None if words is None else torch.empty((0, words.shape[-1]), dtype=words.dtype)
        self._modules: dict[str, nn.Module] = {
            each.name: layers[each.made_at] if each.is_of_layer else model.get_submodule(each.name)
            for each in made
            if not each.is_ids
        }

    def text_arguments(
        self, states: Tensor, shape: tuple[int, int], shortcuts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what a model is called with as its text: what the first stage is given, or what replaces it on others.

        What the prologue makes of zeros there is discarded.
        """
        if self._is_first:
            return {"inputs_embeds" if states.is_floating_point() else "input_ids": states}
        if INPUT_IDS in shortcuts:
            return {"input_ids": shortcuts[INPUT_IDS]}
        if self._needs_ids:  # the caller has given embeddings, as what asks for ids can tell
            assert self._word_like is not None
            zeros = self._word_like.new_zeros((*shape, self._word_like.shape[1])).to(states.device)
            return {"inputs_embeds": zeros}
        return {"input_ids": states.new_zeros(shape, dtype=torch.int64)}

    def begin(self, states: Tensor) -> dict[str, Tensor]:
        """Return what later stages use of this one's input; the hooks add what its modules make."""
        if not self._is_first:
            return {}
        if not states.is_floating_point():
            return {INPUT_IDS: states} if self._gives_ids else {}
        return {name: states for name, module in self._modules.items() if self._words in module.modules()}

    def register_hooks(self, made: dict[str, Tensor]) -> Iterator[RemovableHandle]:
        """Register hooks that add to `made` what the modules of this stage make for later ones."""
        for name, module in self._modules.items():

            def keep(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                made[name] = output if isinstance(output, Tensor) else output[0]

            yield module.register_forward_hook(in_this_thread(keep))

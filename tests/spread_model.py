"""An uncut model whose layers are on several devices: the reference of plans that mix them.

Hidden states are moved by hooks; what each stage computes for itself, rotary tables and masks, is computed on each device.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from accelerators import moved
from lingualinked.model.cutting.parts import find_parts


class SpreadModel:
    """A checkpoint in this process; its caller is on the CPU."""

    def __init__(self, folder: Path) -> None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        self._model, self._past = model, None
        parts = find_parts(model)
        self._layers: Any = model.get_submodule(parts.layers)
        self._prologue = [model.get_submodule(path) for path in parts.prologue]
        self._epilogue = [model.get_submodule(path) for path in parts.epilogue]
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())  # tied ends may be on two devices
        self._ropes = [name for name, _ in model.named_modules() if name.endswith("rotary_emb")]
        self._whole_ropes = {name: copy.deepcopy(model.get_submodule(name)) for name in self._ropes}
        for module in (*self._layers, *self._epilogue):
            module.register_forward_pre_hook(self._move_inputs, with_kwargs=True)

    def place_layers(self, devices: list[str]) -> None:
        """Put each layer, with its KV, on a device; what is before and behind them is beside the first and the last."""
        for index, (layer, device) in enumerate(zip(self._layers, devices, strict=True)):
            layer.to(device)
            if self._past is not None:
                held = self._past.layers[index]
                held.keys, held.values = held.keys.to(device), held.values.to(device)
        for module in self._prologue:
            module.to(devices[0])
        for name in self._ropes:
            self._model.get_submodule(name).to(devices[0])
        for module in self._epilogue:
            module.to(devices[-1])

    def __call__(self, ids: torch.Tensor, past_key_values: Cache | None = None, **arguments: Any) -> Any:
        """Run a step; a KV cache that it returns moves with the layers from then on."""
        first = next(self._prologue[0].parameters()).device
        output = self._model(ids.to(first), past_key_values=past_key_values, **moved(arguments, first))
        self._past = output.past_key_values
        return moved(output, "cpu")

    def _move_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = next(module.parameters()).device
        args, kwargs = moved(args, device), moved(kwargs, device)
        if "position_embeddings" in kwargs and self._ropes:
            kwargs["position_embeddings"] = self._rotary_tables(args[0], kwargs)
        return args, kwargs

    def _rotary_tables(self, states: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Compute them on the device of the hidden states, as a stage does."""
        (name,) = self._ropes
        rope = copy.deepcopy(self._whole_ropes[name]).to(states.device)
        return rope(states, kwargs["position_ids"])

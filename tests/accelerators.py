"""Where the models compute that tests compare: on the CPU, or where ``pytest --accelerator`` says.

An uncut model that computes elsewhere takes and returns tensors on the CPU, as a sharded one does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

import lingualinked as ll

chosen = "cpu"
"""The accelerator by name."""

is_asked_for = False
"""Whether ``--accelerator`` is given; `conftest.py` sets both before tests run."""


def device(name: str, **arguments: Any) -> ll.Device:
    """Describe a worker with one thread, which computes where the tests' models do."""
    return ll.Device(**{"name": name, "threads": 1, "accelerator": chosen, **arguments})


def on_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """Move an uncut model to where the tests' models compute; its caller stays on the CPU."""
    if is_asked_for:
        model.to(chosen)
        serve_from_cpu(model)
    return model


def serve_from_cpu(model: PreTrainedModel) -> None:
    """Make a model that computes elsewhere take tensors on the CPU, and return its outputs and its loss there."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (_CalledFromCpu, kind), {"__module__": kind.__module__})


def embed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return a model's embeddings of token ids, on the CPU."""
    embeddings = model.get_input_embeddings()
    return embeddings(ids.to(embeddings.weight.device)).cpu()


class _CalledFromCpu:
    """Is put before the class of a model: ``generate`` then runs on the CPU, and each forward pass elsewhere."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        there = self.get_input_embeddings().weight.device
        for cache in (each for each in (*args, *kwargs.values()) if isinstance(each, Cache)):
            _follow(cache, there)
        return moved(super().__call__(*moved(args, there), **moved(kwargs, there)), "cpu")

    @property
    def loss_function(self) -> Any:
        compute = super().loss_function
        return lambda *args, **kwargs: compute(*moved(args, "cpu"), **moved(kwargs, "cpu"))

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value


def _follow(cache: Cache, there: torch.device) -> None:
    """Move a KV cache that ``generate`` has allocated where its caller is."""
    for layer in cache.layers:
        held = {name: each for name, each in vars(layer).items() if isinstance(each, Tensor)}
        if layer.is_initialized and any(each.device != there for each in held.values()):
            vars(layer).update({name: each.to(there) for name, each in held.items()}, device=there)


def moved(value: Any, target: torch.device | str) -> Any:
    """Return a structure with its tensors on another device; a KV cache stays where it is."""
    if isinstance(value, Tensor):
        return value.to(target)
    if isinstance(value, dict):  # transformers' outputs are dicts, of classes that tests compare
        changed = {name: moved(each, target) for name, each in value.items()}
        return type(value)(**changed)
    if type(value) in (tuple, list):
        return type(value)(moved(each, target) for each in value)
    return value

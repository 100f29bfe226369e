"""Joins cut models into one that shares their weights; the original models stay usable.

Knows modules, and which of them are stand-ins; no files, caches or sessions.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from lingualinked.model.adapters.stage_adapters import find_base
from lingualinked.model.cutting.cut import Boundary, StandIn, prune
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.hf_internals import building
from lingualinked.model.weights.span_loading import LoadedSpan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel

    from lingualinked.model.cutting.model_parts import ModelParts


def join_spans(spans: Sequence[LoadedSpan], start: int, end: int) -> LoadedSpan:
    """Make the cut model of layers ``[start, end)`` from cut models that together hold these layers; share their weights.

    Each layer, and each end, is taken from the first span that holds it. All spans must be on the same device.
    """
    like = spans[0]
    parts, boundary = like.parts, Boundary()
    owned = [f"{parts.layers}.{index}" for index in range(start, end)]
    owned += (parts.prologue if start == 0 else ()) + (parts.epilogue if end == parts.num_layers else ())
    found = {path: _find_module(path, spans) for path in owned}
    with building.GLOBAL_STATE:  # so that no module is copied in the middle of a step
        model = _copy_tree(like.model, parts)
    for path, module in found.items():
        model.set_submodule(path, module)
    building.set_ties(model, dict(like.tied))
    prune(model, parts, start, end, boundary)
    _tie_parameters(model, building.ties(model), {id(module) for module in found.values()})
    return LoadedSpan(model=model, boundary=boundary, parts=parts, tied=like.tied, num_bytes_read=0)


def _find_module(path: str, spans: Iterable[LoadedSpan]) -> nn.Module:
    for span in spans:
        module = span.model.get_submodule(path)
        if not isinstance(module, StandIn):
            return module
    raise AssertionError(f"none of the spans holds {path}")


def _copy_tree(model: PreTrainedModel, parts: ModelParts) -> PreTrainedModel:
    """Copy a model's tree of modules; share its configurations, and the modules that a cut may replace."""
    layers = (f"{parts.layers}.{index}" for index in range(parts.num_layers))
    paths = (*layers, *parts.prologue, *parts.epilogue, *parts.transmission.held)
    shared: list[object] = [model.get_submodule(path) for path in paths]
    shared += [model.config, getattr(model, "generation_config", None)]  # classes that do not generate have none
    return copy.deepcopy(model, {id(each): each for each in shared})


def _tie_parameters(model: PreTrainedModel, tied: Mapping[str, str], shared: set[int]) -> None:
    """Make both names of a tied parameter refer to one tensor, if the model holds both ends."""
    for target, source in tied.items():
        path, _, name = target.rpartition(".")
        path, owner = find_base(path, model.get_submodule(path))
        parameter = model.get_parameter(source)
        if getattr(owner, name, None) is parameter:
            continue
        if isinstance(owner, PackedLinear):
            owner = owner.plain()
        elif id(owner) in shared:  # another stage computes with it
            owner = _copy_of(owner)
        owner.register_parameter(name, parameter)
        model.set_submodule(path, owner)


def _copy_of(module: nn.Module) -> nn.Module:
    """Copy a module, but not its parameters and children."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)  # noqa: SLF001 - copy.copy shares the dictionary
    return twin


def missing_spans(start: int, end: int, held: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans of ``[start, end)`` that no span in `held` covers, in order."""
    missing, position = [], start
    for first, stop in sorted(held):
        if position < min(first, end):
            missing.append((position, min(first, end)))
        position = max(position, stop)
    if position < end:
        missing.append((position, end))
    return missing

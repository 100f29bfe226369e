"""Join cut models that hold neighbouring spans into one, sharing their weights; those that it is made from stay usable.

Knows modules and which of them are stand-ins; nothing of files, caches or sessions.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from lingualinked.model import hf_internals
from lingualinked.model.cut import Boundary, StandIn, prune
from lingualinked.model.loading import LoadedSpan
from lingualinked.model.packed_linear import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel

    from lingualinked.model.parts import ModelParts


def join_spans(spans: Sequence[LoadedSpan], start: int, end: int) -> LoadedSpan:
    """Make the cut model of layers ``[start, end)`` from cut models that hold them among themselves.

    Parameters
    ----------
    spans : sequence of LoadedSpan
        Of the same model, on the same device. Each layer, and each end, is taken from the first that has it.
    start, end : int
        Half-open layer range.

    Returns
    -------
    LoadedSpan
        Its weights are theirs.
    """
    like = spans[0]
    parts, boundary = like.parts, Boundary()
    owned = [f"{parts.layers}.{index}" for index in range(start, end)]
    owned += (parts.prologue if start == 0 else ()) + (parts.epilogue if end == parts.num_layers else ())
    found = {path: _find(path, spans) for path in owned}
    with hf_internals.GLOBAL_STATE:  # nothing is copied in the middle of a step
        model = _shell(like.model, parts)
    for path, module in found.items():
        model.set_submodule(path, module)
    hf_internals.set_ties(model, dict(like.tied))
    prune(model, parts, start, end, boundary)
    _tie(model, hf_internals.ties(model), {id(module) for module in found.values()})
    return LoadedSpan(model=model, boundary=boundary, parts=parts, tied=like.tied, num_bytes_read=0)


def _find(path: str, spans: Iterable[LoadedSpan]) -> nn.Module:
    for span in spans:
        module = span.model.get_submodule(path)
        if not isinstance(module, StandIn):
            return module
    raise AssertionError(f"none of the spans holds {path}")


def _shell(model: PreTrainedModel, parts: ModelParts) -> PreTrainedModel:
    """Copy a model's tree, but for configurations and for what a cut may replace, which both then share."""
    layers = (f"{parts.layers}.{index}" for index in range(parts.num_layers))
    shared: list[object] = [model.get_submodule(path) for path in (*layers, *parts.prologue, *parts.epilogue)]
    shared += [model.config, model.generation_config]
    return copy.deepcopy(model, {id(each): each for each in shared})


def _tie(model: PreTrainedModel, tied: Mapping[str, str], shared: set[int]) -> None:
    """Have both names of a tied parameter mean one, where both ends of the model are held: it is then held once."""
    for target, source in tied.items():
        path, _, name = target.rpartition(".")
        owner, parameter = model.get_submodule(path), model.get_parameter(source)
        if getattr(owner, name, None) is parameter:
            continue
        if isinstance(owner, PackedLinear):
            owner = owner.plain()
        elif id(owner) in shared:  # another stage computes with it
            owner = _copy_of(owner)
        owner.register_parameter(name, parameter)
        model.set_submodule(path, owner)


def _copy_of(module: nn.Module) -> nn.Module:
    """Copy a module, not what it holds."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)  # noqa: SLF001 - copy.copy shares the dictionary
    return twin

"""Finds out what a transformers class's ``forward`` accepts for its loss, and what it returns.

Inspects classes without naming any; runs nothing with data.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import typing
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from lingualinked.model.cutting.architectures import find_class
from lingualinked.model.cutting.parts import build_meta
from lingualinked.model.cutting.trace import NoData
from lingualinked.model.hf_internals.cache_arguments import cache_argument, keeps_cache
from lingualinked.model.spec import ModelSpec

_LOSS_PARAMETERS = inspect.signature(ForCausalLMLoss).parameters
LOSS_ARGUMENTS = frozenset(_LOSS_PARAMETERS) - {"logits", "labels", "vocab_size", "kwargs"}
"""Arguments of ``forward`` that only the loss uses."""
IGNORED: int = _LOSS_PARAMETERS["ignore_index"].default
"""The label of positions that the loss ignores."""


def output_class(real: type[PreTrainedModel]) -> type[ModelOutput]:
    """Return the output class in the annotation of a class's ``forward``; the usual one where custom code has none."""
    annotation = inspect.signature(real.forward).return_annotation
    kinds: tuple[Any, ...] = (annotation, *typing.get_args(annotation))
    if isinstance(annotation, str):  # of a module with postponed annotations
        names = vars(sys.modules[inspect.unwrap(real.forward).__module__])
        kinds = tuple(names.get(name) for name in re.findall(r"\w+", annotation))
    named = (each for each in kinds if inspect.isclass(each) and issubclass(each, ModelOutput))
    return next(named, CausalLMOutputWithPast)


@functools.cache
def calls_loss_function(real: Any) -> bool:
    """Return whether a class's ``forward`` leaves the loss to transformers' ``loss_function``, and has no code of its own for it."""
    for cls in real.__mro__:
        forward = inspect.unwrap(vars(cls).get("forward", None) or _no_forward)
        if "loss_function" in forward.__code__.co_names:
            return True
        if forward is not _no_forward and "super" not in forward.__code__.co_names:
            return False
    return False


def _no_forward() -> None:
    """Stand for the forward pass of a class that has none of its own."""


def base_output_class(real: type[PreTrainedModel]) -> type[ModelOutput]:
    """Return the output class of a class without a head, some of whose annotations are of a class with one."""
    named = output_class(real)
    return named if "last_hidden_state" in inspect.signature(named).parameters else BaseModelOutputWithPast


def returns_unrequested_cache(spec: ModelSpec) -> bool:
    """Return whether a model returns a KV cache that it was given even under ``use_cache=False``, by a pass without data."""
    cls = find_class(spec)
    name = cache_argument(cls)
    if name is None or not keeps_cache(cls):
        return False
    # Some kernels can't run float32 on the meta device.
    meta: Any = build_meta(dataclasses.replace(spec, dtype="bfloat16"))
    ids = torch.zeros((1, 2), dtype=torch.int64, device="meta")
    with torch.no_grad(), NoData():
        output = meta(input_ids=ids, use_cache=False, **{name: DynamicCache(config=meta.config)})
    return output.get(name) is not None

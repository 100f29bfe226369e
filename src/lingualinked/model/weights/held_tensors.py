"""Finds and writes the tensors that a cut model holds, by their names in the whole model.

Knows modules, ties and how weights are packed; neither stages nor why something is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lingualinked.model.adapters.stage_adapters import find_base
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.weights.span_loading import LoadedSpan


def canonical_name(span: LoadedSpan, name: str) -> str:
    """Return the name by which a tensor is loaded: of a tied parameter, its source's."""
    return span.tied.get(name, name)


def holds_tensor(span: LoadedSpan, name: str) -> bool:
    """Return whether a cut model holds a tensor, under one of its names."""
    return next(_places(span, name), None) is not None


def find_parameter(span: LoadedSpan, name: str) -> Tensor | None:
    """Return a parameter of the whole model (of tied ones, the source), or None if a cut model does not hold it."""
    for known in (name, *(target for target, source in span.tied.items() if source == name)):
        path, _, attribute = known.rpartition(".")
        try:
            module: nn.Module = find_base(path, span.model.get_submodule(path))[1]
        except AttributeError:
            continue
        if isinstance(module, PackedLinear) and attribute == "weight":
            return module.unpacked()
        held = module._parameters.get(attribute)  # noqa: SLF001 - other attributes of this name are not weights
        if held is not None:
            return held.detach()
    return None


def find_tensor(span: LoadedSpan, name: str) -> Tensor | None:
    """Return a parameter, buffer or other tensor of a module by its name in the whole model, or None."""
    held = find_parameter(span, name)
    if held is None:
        path, _, attribute = name.rpartition(".")
        try:
            held = getattr(find_base(path, span.model.get_submodule(path))[1], attribute, None)
        except AttributeError:
            return None
    return held.detach() if isinstance(held, Tensor) else None


def write_tensor(span: LoadedSpan, name: str, value: Tensor) -> None:
    """Write a tensor wherever a cut model holds it.

    Memory stays where it is, since captured steps and kernels have its address, except for that of packed weights.
    """
    for module, held in _places(span, name):
        if held is None:
            module.repack(value)
        else:
            with torch.inference_mode():  # a buffer may have been made in it
                held.detach().copy_(value)


def _places(span: LoadedSpan, name: str) -> Iterator[tuple[Any, Tensor | None]]:
    """Yield each module that holds a tensor, and the tensor; None if the module has packed it."""
    source = canonical_name(span, name)
    for known in (source, *(target for target, tied in span.tied.items() if tied == source)):
        path, _, attribute = known.rpartition(".")
        try:
            module: Any = find_base(path, span.model.get_submodule(path))[1]
        except AttributeError:
            continue
        is_packed = isinstance(module, PackedLinear) and attribute == "weight"
        held = None if is_packed else getattr(module, attribute, None)
        if is_packed or isinstance(held, Tensor):
            yield module, held


def sum_of_products(u: Tensor, v: Tensor) -> Tensor:
    """Return what two factors add to a weight: the outer product of vectors, or ``u @ v.T`` of matrices."""
    return torch.outer(u, v) if u.ndim == v.ndim == 1 else u @ v.T

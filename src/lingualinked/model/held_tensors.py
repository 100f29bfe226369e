"""Writes the tensors that a cut model holds, by their names in the whole model.

Knows modules, ties and how weights are packed; neither stages nor why something is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.span_loading import LoadedSpan
from lingualinked.model.stage_adapters import find_base


def canonical_name(span: LoadedSpan, name: str) -> str:
    """Return the name by which a tensor is loaded: of a tied parameter, its source's."""
    return span.tied.get(name, name)


def write_tensor(span: LoadedSpan, name: str, value: Tensor) -> bool:
    """Write a tensor wherever a cut model holds it; return whether it does.

    Memory stays where it is, since captured steps and kernels have its address, except for that of packed weights.
    """
    source = canonical_name(span, name)
    is_held = False
    for known in (source, *(target for target, tied in span.tied.items() if tied == source)):
        path, _, attribute = known.rpartition(".")
        try:
            module: Any = find_base(path, span.model.get_submodule(path))[1]
        except AttributeError:
            continue
        if isinstance(module, PackedLinear) and attribute == "weight":
            module.repack(value)
            is_held = True
        elif isinstance(held := getattr(module, attribute, None), Tensor):
            with torch.inference_mode():  # a buffer may have been made in it
                held.detach().copy_(value)
            is_held = True
    return is_held


def sum_of_products(u: Tensor, v: Tensor) -> Tensor:
    """Return what two factors add to a weight: the outer product of vectors, or ``u @ v.T`` of matrices."""
    return torch.outer(u, v) if u.ndim == v.ndim == 1 else u @ v.T

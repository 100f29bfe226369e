"""Makes the modules of a CPU model compute by kernels, where these have been found to have torch's bits.

Knows which kinds of modules have kernels; no stages.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lingualinked.model.exact.exact_gate import speed_up_gates
from lingualinked.model.exact.exact_norm import speed_up_norms
from lingualinked.model.exact.float_linear import speed_up_linears
from lingualinked.model.exact.layer_step import speed_up_layers
from lingualinked.model.exact.packed_linear import pack_linears


def speed_up(model: nn.Module, layers: Iterable[nn.Module], without: Iterable[str] = ()) -> None:
    """Speed up a model and its decoder layers in place, without the linear layers of some paths; hooks and attributes stay."""
    paths = tuple(without)
    pack_linears(model, paths)
    speed_up_linears(model, paths)
    speed_up_norms(model)
    speed_up_gates(model)
    speed_up_layers(layers)

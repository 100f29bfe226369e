"""Cuts a model class to one span: its own forward, with stand-ins for the modules that other stages hold.

Knows modules; no weights, checkpoints, caches or devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lingualinked.errors import ArgumentError
from lingualinked.model.hf_internals import building
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from lingualinked.model.cutting.parts import ModelParts

RawOutput = torch.Tensor | tuple[torch.Tensor | None, ...]


class SpanLeft(Exception):  # noqa: N818 - it ends a forward pass and is not an error
    """The forward pass has reached the first layer after the span, or what follows the last layer if that is not needed."""


class Boundary:
    """The raw layer outputs that enter and leave a span during one forward pass."""

    def __init__(self) -> None:
        self.incoming: RawOutput | None = None  # of the last layer before the span, on the previous stage
        self.outgoing: RawOutput | None = None  # of the last layer of the span
        self.is_passed = False  # whether the forward pass goes on behind the span, to return what it has recorded
        self.is_end = False  # whether it ends with the last layer of the span, though the epilogue is here

    def capture_output(self, _layer: nn.Module, _arguments: Any, output: RawOutput) -> None:
        """Keep the output of the last layer, and leave the span if the forward pass ends there; a forward hook."""
        self.outgoing = output
        if self.is_end:
            raise SpanLeft

    def clear(self) -> None:
        """Drop both tensors, so that they can be freed between steps."""
        self.incoming = self.outgoing = None
        self.is_passed = self.is_end = False


class StandIn(nn.Module):
    """Replaces a module that another stage holds."""


class ReplayLayer(StandIn):
    """Replaces a layer before the span: returns the complete output of the previous stage's last layer."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__()
        self.boundary = boundary

    def forward(self, *_args: Any, **_kwargs: Any) -> RawOutput | None:
        """Ignore the input, which is a dummy, and return the incoming output."""
        return self.boundary.incoming


class ExitLayer(StandIn):
    """Replaces a layer after the span: ends the forward pass on entry, unless it is to go on to its end.

    Anything that the model does between two layers has been done by then.
    """

    def __init__(self, boundary: Boundary) -> None:
        super().__init__()
        self.boundary = boundary

    def forward(self, *_args: Any, **_kwargs: Any) -> RawOutput | None:
        """Raise SpanLeft, or return the output of the span."""
        if not self.boundary.is_passed:
            raise SpanLeft
        return self.boundary.outgoing


class PassThrough(StandIn):
    """Replaces a norm, a projection or the head: returns its first argument."""

    def forward(self, first: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Return `first`."""
        return first


class ZeroEmbedding(StandIn):
    """Replaces an embedding on a later stage, where its result is discarded: returns zeros of a shape that broadcasts."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dim, self.dtype = dim, dtype

    def forward(self, first: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Return zeros [1, 1, dim]."""
        return torch.zeros((1, 1, self.dim), dtype=self.dtype, device=first.device)


def cut_class(
    cls: type[PreTrainedModel], parts: ModelParts, start: int, end: int, boundary: Boundary
) -> type[PreTrainedModel]:
    """Derive a class whose instances hold only layers ``[start, end)``, and what must run before or after them.

    The full model is built, on the meta device, and then pruned, so that layer indices and per-layer types stay correct. The
    class keeps the name and module of `cls`, by which transformers looks things up.
    """

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        cls.__init__(self, config, *args, **kwargs)
        prune(self, parts, start, end, boundary)

    namespace = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "get_init_context": building.exclusive_init_context(cls),
    }
    derived: type[PreTrainedModel] = type(cls.__name__, (cls,), namespace)
    return derived


def prune(model: PreTrainedModel, parts: ModelParts, start: int, end: int, boundary: Boundary) -> None:
    """Replace the modules that a stage of layers ``[start, end)`` does not hold by stand-ins, in place."""
    layers = model.get_submodule(parts.layers)
    assert isinstance(layers, nn.ModuleList)
    replay, leave = ReplayLayer(boundary), ExitLayer(boundary)
    for index in range(parts.num_layers):
        if not start <= index < end:
            layers[index] = replay if index < start else leave
    elsewhere = (parts.prologue if start > 0 else ()) + (parts.epilogue if end < parts.num_layers else ())
    for path in elsewhere:
        module = model.get_submodule(path)
        stand_in: nn.Module
        if isinstance(module, nn.Embedding):
            stand_in = ZeroEmbedding(module.embedding_dim, module.weight.dtype)
        elif isinstance(module, StandIn):
            continue
        else:
            stand_in = PassThrough()
        model.set_submodule(path, stand_in)
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = {target: source for target, source in building.ties(model).items() if {target, source} <= held}
    building.set_ties(model, tied)


def flatten_output(output: RawOutput | None) -> tuple[tuple[torch.Tensor, ...], tuple[bool, ...] | None]:
    """Return the tensors of a layer's raw output that cross the boundary, and the layout of the output.

    Only the hidden states of a tuple do: in every supported architecture the other items are attention weights, which the
    next layer does not use, and whose size grows with the square of the text.
    """
    assert output is not None
    if isinstance(output, torch.Tensor):
        return (output,), None
    assert isinstance(output[0], torch.Tensor)
    return (output[0],), (True,) + (False,) * (len(output) - 1)


def unflatten_output(tensors: tuple[torch.Tensor, ...], layout: tuple[bool, ...] | None) -> RawOutput:
    """Rebuild the raw output of the previous stage's last layer."""
    if len(tensors) != (1 if layout is None else sum(layout)):
        raise ArgumentError(
            f"{count_text(len(tensors), 'tensor')} arrived at a stage, which does not match the layout {layout}"
        )
    if layout is None:
        return tensors[0]
    remaining = iter(tensors)
    return tuple(next(remaining) if is_tensor else None for is_tensor in layout)

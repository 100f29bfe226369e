"""Cuts a model class to one span: its own forward, with stand-ins for the modules that other stages hold.

Knows modules; no weights, checkpoints, caches or devices.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lingualinked.errors import ArgumentError
from lingualinked.model.hf_internals import building
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from lingualinked.model.cutting.model_parts import ModelParts, OutputShape

RawOutput = torch.Tensor | tuple[torch.Tensor | None, ...]


class SpanLeft(Exception):  # noqa: N818 - it ends a forward pass and is not an error
    """The forward pass has reached the first layer after the span, or what follows the last layer if that is not needed."""


class _LongerOutput(tuple[Any, ...]):
    """What a stand-in returns of a layer: some classes look behind it, for what only layers of their own have recorded."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        """Return an item, or None behind the last one."""
        return None if isinstance(index, int) and index >= len(self) else super().__getitem__(index)


class Boundary:
    """What enters and leaves a span during one forward pass, beside the arguments of the model."""

    def __init__(self) -> None:
        self.incoming: RawOutput | None = None  # of the last layer before the span, on the previous stage
        self.outgoing: RawOutput | None = None  # of the last layer of the span
        self.leaving: torch.Tensor | None = None  # what the first layer after the span was called with
        self.shortcuts: Mapping[str, torch.Tensor] = {}  # what other stages have made, by the name of the shortcut
        self.shape = (1, 1)  # rows and new tokens of the step
        self.device = torch.device("cpu")
        self.keeps_own = False  # whether the model keeps an object of its own class, that layers get and return
        self.answers = False  # whether stand-ins have the attributes of what they replace (`answering`)
        self.is_passed = False  # whether the forward pass goes on behind the span, to return what it has recorded
        self.is_end = False  # whether it ends with the last layer of the span, though the epilogue is here

    def capture_output(self, _layer: nn.Module, _arguments: Any, output: RawOutput) -> None:
        """Keep the output of the last layer, and leave the span if the forward pass ends there; a forward hook."""
        self.outgoing = tuple(output) if isinstance(output, list) else output
        if self.is_end:
            raise SpanLeft

    def filled(self, output: RawOutput | None, given: tuple[Any, ...]) -> Any:
        """Return a layer's output for a stand-in, with what is kept of the text, as it was given, where a layer returns it."""
        if not isinstance(output, tuple):
            return output
        if self.keeps_own:
            kept = iter([each for each in given if isinstance(each, list | tuple)])
            filled: Any = (output[0], *(next(kept, None) if item is None else item for item in output[1:]))
        else:
            filled = output
        return _LongerOutput(filled) if self.is_passed else filled

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Let stand-ins have the attributes of what they replace, while the model's own code runs in the context.

        To anything else they would seem to hold weights.
        """
        self.answers = True
        try:
            yield
        finally:
            self.answers = False

    def clear(self) -> None:
        """Drop all tensors, so that they can be freed between steps."""
        self.answers = False
        self.incoming = self.outgoing = self.leaving = None
        self.shortcuts = {}
        self.is_passed = self.is_end = False


class StandIn(nn.Module):
    """Replaces a module that another stage holds; has the plain attributes of that module, and its parameters without data."""

    def __init__(self, original: nn.Module | None = None) -> None:
        super().__init__()
        self._original = None if original is None else describe_module(original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original, boundary = vars(self).get("_original"), vars(self).get("boundary")
            if original is None or boundary is None or not boundary.answers or name.startswith("_"):
                raise
            return getattr(original, name)


def describe_module(module: nn.Module) -> Any:
    """Return an object with the attributes of a module and of those inside: no weights, no code."""
    if isinstance(module, StandIn):
        return vars(module)["_original"]
    sources = [
        vars(cls) for cls in reversed(type(module).__mro__) if issubclass(cls, nn.Module) and cls is not nn.Module
    ]
    attributes = [item for source in (*sources, vars(module)) for item in source.items()]
    known = {
        name: value
        for name, value in attributes
        if not name.startswith("_") and name != "training" and not hasattr(type(value), "__get__")
    }
    tensors = {**module._parameters, **module._buffers}  # noqa: SLF001 - these are only the module's own
    known |= {name: None if each is None else torch.empty_like(each, device="meta") for name, each in tensors.items()}
    known |= {name: None if child is None else describe_module(child) for name, child in module._modules.items()}  # noqa: SLF001
    weight = getattr(module, "weight", None)  # that of a packed layer is not a parameter
    if "weight" not in known and isinstance(weight, torch.Tensor):
        known["weight"] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return SimpleNamespace(**known)


class ReplayLayer(StandIn):
    """Replaces a layer before the span: returns what the previous stage's last layer has, or its own output if that is a shortcut."""

    def __init__(self, boundary: Boundary, original: nn.Module | None = None, index: int = -1) -> None:
        super().__init__(original)
        self.boundary = boundary
        self._name = f"layer {index}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Ignore the input, which is a dummy, and return the incoming output."""
        shortcut, incoming = self.boundary.shortcuts.get(self._name), self.boundary.incoming
        if shortcut is None:
            return self.boundary.filled(incoming, (*args, *kwargs.values()))
        return (shortcut, *incoming[1:]) if isinstance(incoming, tuple) else shortcut


class ExitLayer(StandIn):
    """Replaces a layer after the span: ends the forward pass on entry, unless it is to go on to its end.

    Anything that the model does between two layers has been done by then.
    """

    def __init__(self, boundary: Boundary, original: nn.Module | None = None) -> None:
        super().__init__(original)
        self.boundary = boundary

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise SpanLeft, or return the output of the span."""
        given = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        if self.boundary.leaving is None:
            self.boundary.leaving = next((each for each in given if each.is_floating_point()), None)
        if not self.boundary.is_passed:
            raise SpanLeft
        return self.boundary.filled(self.boundary.outgoing, (*args, *kwargs.values()))


class AbsentModule(StandIn):
    """Base of what replaces a part of the model beside its layers: its weights seem to lie where the stage computes."""

    def __init__(self, boundary: Boundary, original: nn.Module) -> None:
        super().__init__(original)
        self.boundary = boundary

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, torch.Tensor) and value.is_meta:
            seen = torch.zeros((), dtype=value.dtype, device=self.boundary.device).expand(value.shape)
            vars(seen)["_is_hf_initialized"] = True  # some classes initialise what is inside others
            return seen
        return value


class PassThrough(AbsentModule):
    """Replaces a norm, a projection or the head: returns its first argument of floating-point numbers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor of floating-point numbers, or whatever comes first."""
        given = (*args, *kwargs.values())
        floating = (each for each in given if isinstance(each, torch.Tensor) and each.is_floating_point())
        return next(floating, given[0])


class AbsentPart(AbsentModule):
    """Replaces a part before the layers on a later stage: returns what the first stage has made of it, or zeros.

    What the model makes of zeros is discarded, but may be written to.
    """

    def __init__(self, boundary: Boundary, original: nn.Module, output: OutputShape) -> None:
        super().__init__(boundary, original)
        self._output, self._dtype = output, getattr(torch, output.dtype)

    def forward(self, *args: Any, **_kwargs: Any) -> torch.Tensor:
        """Return what the first stage has made, or zeros of the shape that the part would return."""
        shortcut = self.boundary.shortcuts.get(self._output.path)
        if shortcut is not None:
            return shortcut
        sizes = self._output.sizes(*self.boundary.shape)
        first = args[0] if args else None
        if "tokens" not in self._output.shape and isinstance(first, torch.Tensor):  # an embedding of more than the text
            sizes = (*first.shape, *sizes[first.ndim :])
        return torch.zeros(sizes, dtype=self._dtype, device=self.boundary.device)


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
    for index in range(parts.num_layers):
        if index < start:
            layers[index] = ReplayLayer(boundary, layers[index], index)
        elif index >= end:
            layers[index] = ExitLayer(boundary, layers[index])
    outputs = {each.path: each for each in parts.outputs}
    elsewhere = (
        parts.dropped + (parts.prologue if start > 0 else ()) + (parts.epilogue if end < parts.num_layers else ())
    )
    for path in elsewhere:
        module = model.get_submodule(path)
        if path in outputs:
            model.set_submodule(path, AbsentPart(boundary, module, outputs[path]))
        else:
            model.set_submodule(path, PassThrough(boundary, module))
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = {target: source for target, source in building.ties(model).items() if {target, source} <= held}
    building.set_ties(model, tied)


def output_of(boundary: Boundary, items: tuple[bool, ...] | None) -> RawOutput | None:
    """Return what leaves a span: if the model has passed over its last layer, what the first one after the span was called with.

    `items` say which items of that layer's output are used; None: it is a tensor.
    """
    if boundary.outgoing is not None or boundary.leaving is None:
        return boundary.outgoing
    return boundary.leaving if items is None else (boundary.leaving, *[None] * (len(items) - 1))


def flatten_output(
    output: RawOutput | None, used: tuple[bool, ...] | None = None
) -> tuple[tuple[torch.Tensor, ...], tuple[bool, ...] | None]:
    """Return the tensors of a layer's raw output that cross the boundary, and the layout of the output.

    Of a tuple these are the items that the next layer uses; without `used`, the hidden states alone. Others, such as attention
    weights, may grow with the square of the text.
    """
    assert output is not None
    if isinstance(output, torch.Tensor):
        return (output,), None
    layout = tuple(
        isinstance(item, torch.Tensor) and (index == 0 if used is None else index < len(used) and used[index])
        for index, item in enumerate(output)
    )
    assert layout[0]
    return tuple(item for item, crosses in zip(output, layout, strict=True) if crosses and item is not None), layout


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

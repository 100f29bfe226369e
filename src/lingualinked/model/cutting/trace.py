"""Traces which tensors reach which layers of a model, by one forward pass on the meta device without data.

Knows modules and tensors; no spans, no weights and no plans.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Cache

from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

NUM_TOKENS = 2  # of the pass; the only row has so many

Mark = tuple[str, str | int]
"""Where a value comes from: ("ids", ""), ("part", path), ("weight", path of a part), ("layer", index), ("item", "layer.number of it") or ("inside", index)."""


class LayersNotRunError(Exception):
    """A pass has not run every layer once, in order."""


@dataclass(slots=True)
class Flow:
    """What a forward pass has shown; layers are counted from 0, and what follows the last one is layer `num_layers`."""

    dtype: torch.dtype  # of the model in this pass
    before: set[str] = field(default_factory=set)  # parts that run before the first layer
    between: set[str] = field(default_factory=set)
    after: set[str] = field(default_factory=set)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of parts that return one tensor
    layers: list[tuple[Any, ...]] = field(default_factory=list)  # their outputs: tuples, or one tensor alone
    items: list[tuple[bool, ...] | None] = field(default_factory=list)  # of layers' outputs, which the next layer uses
    used_at: dict[Mark, set[int]] = field(
        default_factory=dict
    )  # layers that use a value beside the last layer's output
    inputs_of: dict[str, set[Mark]] = field(default_factory=dict)  # of parts


class NoData(TorchFunctionMode):
    """Makes tests of a tensor's values (``bool``, ``in``) return False, so that a forward pass runs on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.__bool__, Tensor.__contains__):
            return False
        return func(*args, **(kwargs or {}))


class _Marking(NoData):
    """Passes the marks of arguments on to results, outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, tuple[Tensor, frozenset[Mark]]] = {}  # with the tensor, whose id stays its own
        self.depth = 0  # of the layers that run

    def marks_of(self, value: Any) -> frozenset[Mark]:
        """Return the marks of all tensors in a value."""
        found = (self._marks.get(id(each)) for each in tensors_in(value))
        return frozenset().union(*(known[1] for known in found if known is not None))

    def mark(self, tensor: Tensor, marks: Iterable[Mark]) -> None:
        """Replace a tensor's marks."""
        self._marks[id(tensor)] = tensor, frozenset(marks)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if self.depth:
            return result
        changed = args[0] if func is Tensor.__setitem__ else result
        if isinstance(changed, (Tensor, tuple, list)):
            marks = self.marks_of((args, kwargs))
            for each in tensors_in(changed) if marks else ():
                self.mark(each, marks | self.marks_of(each))
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers; KV caches are none."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)


def trace(model: PreTrainedModel, layers: nn.ModuleList, parts: Mapping[str, nn.Module]) -> Flow:
    """Run a model on the meta device once; return what its parts and layers use of each other."""
    tracer = _Tracer(len(layers), model.dtype)
    with contextlib.ExitStack() as stack:
        for path, module in parts.items():
            for handle in tracer.watch_part(path, module):
                stack.callback(handle.remove)
        for index, layer in enumerate(layers):
            for handle in tracer.watch_layer(index, layer):
                stack.callback(handle.remove)
        ids = torch.zeros((1, NUM_TOKENS), dtype=torch.int64, device="meta")
        tracer.marking.mark(ids, {("ids", "")})
        with torch.no_grad(), tracer.marking:
            output = model(input_ids=ids, use_cache=False)
    return tracer.end(output.to_tuple()[0])


class _Tracer:
    """Records what parts and layers are called with, by hooks that mark what they return."""

    def __init__(self, num_layers: int, dtype: torch.dtype) -> None:
        self.marking = _Marking()
        self._flow = Flow(dtype)
        self._num_layers = num_layers
        self._num_done = 0

    def end(self, output: Any) -> Flow:
        """Return what the pass with this output has shown; raise LayersNotRunError if it has not run all layers."""
        if len(self._flow.items) != self._num_layers:
            raise LayersNotRunError(
                f"it runs {len(self._flow.items)} layers, and its list has {count_text(self._num_layers, 'layer')}"
            )
        self._note_uses(self._num_layers, self.marking.marks_of(output))
        return self._flow

    def watch_part(self, path: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hooks of a part, and mark its weights."""
        for parameter in module.parameters():
            self.marking.mark(parameter, {("weight", path)})

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.marking.depth:
                self._enter_part(path, (args, kwargs))

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            if not self.marking.depth:
                self._leave_part(path, output)

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def watch_layer(self, index: int, layer: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hooks of a layer."""

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.marking.depth += 1
            if index:
                self._enter_layer(index, self.marking.marks_of((args, kwargs)))

        def leave(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.marking.depth -= 1
            self._leave_layer(index, (*args, *kwargs.values()), output)

        yield layer.register_forward_pre_hook(enter, with_kwargs=True)
        yield layer.register_forward_hook(leave, with_kwargs=True)

    def _enter_part(self, path: str, given: Any) -> None:
        flow, done = self._flow, self._num_done
        (flow.before if done == 0 else flow.after if done == self._num_layers else flow.between).add(path)
        flow.inputs_of.setdefault(path, set()).update(self.marking.marks_of(given))

    def _leave_part(self, path: str, output: Any) -> None:
        if isinstance(output, Tensor):
            self._flow.outputs[path] = output
        # What a part makes of values before the layers is a new value; behind them, the marks count of all that it comes from.
        kept = self.marking.marks_of(output) if self._num_done == self._num_layers else ()
        for each in tensors_in(output):
            self.marking.mark(each, {("part", path), *kept})

    def _enter_layer(self, index: int, used: frozenset[Mark]) -> None:
        self._note_uses(index, used)
        before = self._flow.items[index - 1]
        if before is not None:
            number = range(len(before))
            self._flow.items[index - 1] = tuple(item == 0 or ("item", f"{index - 1}.{item}") in used for item in number)

    def _leave_layer(self, index: int, given: tuple[Any, ...], output: Any) -> None:
        self._num_done = max(self._num_done, index + 1)
        items = output if isinstance(output, tuple) else (output,)
        self._flow.layers.append(items)
        self._flow.items.append((True,) + (False,) * (len(items) - 1) if items is output else None)
        for value in given:  # what a layer leaves in a container for later ones
            if isinstance(value, (MutableMapping, MutableSequence)) and not isinstance(value, Cache):
                for each in tensors_in(value):
                    if not self.marking.marks_of(each):
                        self.marking.mark(each, {("inside", index)})
        for number, item in enumerate(items):
            for each in tensors_in(item):
                self.marking.mark(each, {("layer", index), ("item", f"{index}.{number}")})

    def _note_uses(self, index: int, used: Iterable[Mark]) -> None:
        """Record what a layer uses beside the output of the layer before it."""
        for mark in used:
            kind, source = mark
            if kind != "item" and not (kind == "layer" and source == index - 1):
                self._flow.used_at.setdefault(mark, set()).add(index)

"""Traces which tensors reach which layers of a model, by one forward pass on the meta device without data.

Knows modules and tensors; no spans, no weights and no plans.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from transformers import Cache

from lingualinked.model.cutting.heads import HeadPass, find_head
from lingualinked.model.kv.kept_values import KeptValues
from lingualinked.model.stages.module_state import ModuleState
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

NUM_ROWS, NUM_TOKENS = 7, 11
"""Of the pass: sizes that dimensions of models hardly have, so that rows and tokens are told from them in every shape."""

Mark = tuple[str, str | int]
"""Where a value comes from: ("ids", ""), ("part", path), ("weight", path of a part), ("layer", index), ("item", "layer.number of it") or ("inside", index)."""


class LayersNotRunError(Exception):
    """A pass has not run any layer."""


@dataclass(slots=True)
class Flow:
    """What a forward pass has shown; layers are counted from 0, and what follows the last one is layer `num_layers`."""

    dtype: torch.dtype  # of the model in this pass
    changes_weights: bool = False  # whether it has changed parameters in place
    before: set[str] = field(default_factory=set)  # parts that run before the first layer
    between: set[str] = field(default_factory=set)
    after: set[str] = field(default_factory=set)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of parts that return one tensor
    layers: dict[int, tuple[Any, ...]] = field(
        default_factory=dict
    )  # outputs of those that run: tuples, or one tensor alone
    items: dict[int, tuple[bool, ...] | None] = field(
        default_factory=dict
    )  # of these outputs, which the next layer uses
    used_at: dict[Mark, set[int]] = field(
        default_factory=dict
    )  # layers that use a value beside the last layer's output
    inputs_of: dict[str, set[Mark]] = field(default_factory=dict)  # of parts


class NoData(TorchFunctionMode):
    """Answers what asks for a tensor's values, so that a forward pass runs on the meta device: nothing is true, or found."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.__bool__, Tensor.__contains__):
            return False
        if func in _ASKS and isinstance(args[0], Tensor) and args[0].is_meta:
            return _ASKS[func](*args, **kwargs)
        if func in _SPLITS and len(args) > 1 and isinstance(args[1], list):
            args = (args[0], _completed(args[1], args[0].shape[kwargs.get("dim", 0)]), *args[2:])
        return func(*args, **kwargs)


def _no_indices(tensor: Tensor, *, as_tuple: bool = False) -> Any:
    found = tensor.new_empty((0, max(1, tensor.ndim)), dtype=torch.int64)
    return found.unbind(1) if as_tuple else found


def _no_values(tensor: Tensor) -> Any:
    return [_no_values(each) for each in tensor.unbind()] if tensor.ndim else 0


def _completed(sizes: list[int], whole: int) -> list[int]:
    """Return sizes that were values, and are not known, such that they make up a whole."""
    return [whole - sum(sizes[1:]), *sizes[1:]] if sum(sizes) != whole else sizes


_ASKS: Mapping[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.nonzero, Tensor.nonzero), _no_indices),
    **dict.fromkeys((Tensor.item, Tensor.tolist), _no_values),
}
_SPLITS = frozenset({torch.split, Tensor.split})


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


@contextlib.contextmanager
def unchecked_distributions() -> Iterator[None]:
    """Keep distributions of torch from checking the values of their parameters, of which there are none."""
    is_checked = Distribution._validate_args  # noqa: SLF001 - torch has a function to set it, none to read it
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(is_checked)


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


def _in_containers(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in containers that a layer can leave something in for later ones."""
    for value in values:
        if isinstance(value, (MutableMapping, MutableSequence)) and not isinstance(value, Cache):
            yield from tensors_in(value)


def trace(model: PreTrainedModel, layers: nn.ModuleList, parts: Mapping[str, nn.Module]) -> Flow:
    """Run a model on the meta device once; return what its parts and layers use of each other."""
    tracer, state = _Tracer(len(layers), model.dtype), ModuleState(model, model.config.model_type)
    with contextlib.ExitStack() as stack:
        stack.enter_context(state.lent_to(KeptValues(), is_first=True))  # a pass without data leaves nothing
        for path, module in parts.items():
            for handle in tracer.watch_part(path, module):
                stack.callback(handle.remove)
        known: dict[Any, Any] = {}
        for index, layer in enumerate(layers):
            for handle in tracer.watch_layer(index, layer):
                stack.callback(handle.remove)
            stack.enter_context(_run_once(layer, known))
        ids = torch.zeros((NUM_ROWS, NUM_TOKENS), dtype=torch.int64, device="meta")
        tracer.marking.mark(ids, {("ids", "")})
        with torch.no_grad(), torch.device("meta"), unchecked_distributions(), tracer.marking:
            _, output = HeadPass(model, find_head(model)).run(is_last=True, input_ids=ids, use_cache=False)
    return tracer.end(output, changes_weights=state.changes_weights)


@contextlib.contextmanager
def _run_once(layer: nn.Module, known: dict[Any, Any]) -> Iterator[None]:
    """Let a layer return tensors like those that one of its kind has returned, if that is all that it does, in the context."""
    kind = type(layer), tuple((name, each.shape, each.dtype) for name, each in layer.named_parameters())
    run = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if any(
            isinstance(value, (MutableMapping, MutableSequence)) for value in values
        ):  # it may leave something there
            return run(*args, **kwargs)
        if kind not in known:
            known[kind] = run(*args, **kwargs)
            return known[kind]
        like = known[kind]
        return type(like)(map(_like, like)) if isinstance(like, (tuple, list)) else _like(like)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _like(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else value


class _Tracer:
    """Records what parts and layers are called with, by hooks that mark what they return."""

    def __init__(self, num_layers: int, dtype: torch.dtype) -> None:
        self.marking = _Marking()
        self._flow = Flow(dtype)
        self._num_layers = num_layers
        self._num_done = 0

    def end(self, output: Any, *, changes_weights: bool) -> Flow:
        """Return what the pass with this output has shown; raise LayersNotRunError if no layer has run."""
        flow = self._flow
        flow.changes_weights = changes_weights
        if not flow.layers:
            raise LayersNotRunError(f"it runs none of its {count_text(self._num_layers, 'layer')}")
        self._note_uses(self._num_layers, self.marking.marks_of(output))
        for index in range(self._num_layers):  # a layer that has not run passes on what it would be called with
            if index not in flow.layers:
                like = max((each for each in flow.layers if each < index), default=min(flow.layers))
                flow.layers[index], flow.items[index] = flow.layers[like], flow.items[like]
        return flow

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
        filled: dict[int, Tensor] = {}

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.marking.depth += 1
            filled.update({id(each): each for each in _in_containers((*args, *kwargs.values()))})
            if index:
                self._enter_layer(index, self.marking.marks_of((args, kwargs)))

        def leave(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.marking.depth -= 1
            given = (*args, *kwargs.values())
            self._leave_layer(index, [each for each in _in_containers(given) if id(each) not in filled], output)

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
        last = self._num_done - 1
        before = self._flow.items.get(last)
        if before is not None:
            number = range(len(before))
            self._flow.items[last] = tuple(item == 0 or ("item", f"{last}.{item}") in used for item in number)

    def _leave_layer(self, index: int, left: Sequence[Tensor], output: Any) -> None:
        self._num_done = max(self._num_done, index + 1)
        is_one = isinstance(output, Tensor)
        items = (output,) if is_one else tuple(output)
        self._flow.layers[index] = items
        self._flow.items[index] = None if is_one else (True,) + (False,) * (len(items) - 1)
        for each in left:
            self.marking.mark(each, {("inside", index)})
        for number, item in enumerate(items):
            for each in tensors_in(item):
                self.marking.mark(each, {("layer", index), ("item", f"{index}.{number}")})

    def _note_uses(self, index: int, used: Iterable[Mark]) -> None:
        """Record what a layer uses beside the output of the layer before it."""
        for mark in used:
            kind, source = mark
            if kind != "item" and not (kind == "layer" and source == self._num_done - 1):
                self._flow.used_at.setdefault(mark, set()).add(index)

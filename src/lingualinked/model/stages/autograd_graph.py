"""The autograd graph of one step in one stage: from its inputs to its outputs, by way of what hooks have made of tensors.

Knows torch's autograd; no modules, messages or other stages.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lingualinked.errors import ProtocolError
from lingualinked.quantities import count_text

Gradients = tuple[Tensor | None, ...]
"""Of several tensors, in order; None where nothing depends on a tensor."""

ReachTap = Callable[[int, Gradients], tuple[Gradients, Gradients]]
"""Is told the gradients of what the hooks of a tap returned; returns those of what they were given, and what is to be injected.

What is injected are gradients that do not come through the stage: of what the hooks of the tap before have returned, or where
there is none, of the stage's inputs.
"""


@dataclass(frozen=True, slots=True)
class _Root:
    """Where a backward pass begins: a tensor's place in the graph, and what a gradient of it is like."""

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Root | None:
        return cls(get_gradient_edge(tensor), tensor.shape, tensor.dtype) if tensor.requires_grad else None


@dataclass(slots=True)
class _Tap:
    """A place where hooks have run: what they were given, and what they have returned."""

    given: tuple[_Root | None, ...]
    token: _Root | None  # of the part of the graph before it
    returned: tuple[_Root | None, ...] = ()
    injected: Gradients = ()  # in the pass in progress, where that could not be done at once


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor that hooks have returned, unless it has been changed in place since."""

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Held:
        return cls(weakref.ref(tensor), tensor._version)  # noqa: SLF001 - no public name

    def get(self) -> Tensor | None:
        tensor = self.tensor()
        return tensor if tensor is not None and tensor._version == self.version else None  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Returned:
    """What hooks have returned: a tensor that they were given, by its place, or another one, by its content.

    A given one may have other content now. It takes the place of the given one in all uses, unless it is a view of another.
    """

    place: int | None
    content: Tensor | None
    is_view: bool = False

    @property
    def is_in_place(self) -> bool:
        """Whether the tensor stays the same object."""
        return self.place is not None and not self.is_view


class AutogradGraph:
    """The graph of one step; `requires_grad` says of which of the stage's inputs gradients are asked for.

    `is_input_known` tells whether the stage's input is what the step begins with, or what the hooks of the last tap in the stage
    before have returned.
    """

    def __init__(self, requires_grad: tuple[bool, ...], *, is_input_known: bool = False) -> None:
        self.requires_grad = requires_grad
        self.ends_at_tap = False  # whether its output is what the hooks of its last tap have returned
        self._is_input_known = is_input_known
        self.num_taps = 0
        self.num_bytes = 0  # that it keeps, besides weights
        self._leaves: tuple[Tensor | None, ...] = ()
        self._roots: tuple[_Root | None, ...] = ()
        self._first_token = torch.zeros((), requires_grad=True)
        self._last_token = self._first_token
        self._device = torch.device("cpu")
        self._entry = _Tap((), None)  # as a tap that has returned the inputs
        self._taps: list[_Tap] = []
        self._held: list[_Held] = []  # what hooks have returned, in order
        self._links: list[tuple[Tensor, _Held]] = []  # what the last tap has returned
        self._reach_tap: ReachTap | None = None
        self._input: _Held | None = None

    def begin(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the stage's inputs as they are part of the graph; raise ProtocolError if there are others than expected."""
        if len(tensors) != len(self.requires_grad):
            raise ProtocolError(
                f"{count_text(len(tensors), 'input')} arrived, and {len(self.requires_grad)} of a step with gradients were due"
            )
        self._device = tensors[0].device
        self._leaves = tuple(
            tensor.detach().requires_grad_() if is_asked else None
            for tensor, is_asked in zip(tensors, self.requires_grad, strict=True)
        )
        # Copies, since leaves can't be changed in place.
        entered = tuple(
            tensor if leaf is None else leaf.clone() for tensor, leaf in zip(tensors, self._leaves, strict=True)
        )
        self._entry.returned = tuple(map(_Root.of, entered))
        self._links = [(tensor, _Held.of(tensor)) for tensor in entered]
        if self._is_input_known and len(entered) == 1 and self._leaves[0] is not None:
            self._input = _Held.of(entered[0])
        return entered

    def end(self, outputs: tuple[Tensor, ...], weights: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Complete the graph; return the stage's outputs without it."""
        self.ends_at_tap = bool(
            self._taps and len(self._links) == len(outputs) == 1 and self._links[0][1].get() is outputs[0]
        )
        self._links.clear()
        self._roots = tuple(map(_Root.of, outputs))
        self.num_bytes = _saved_bytes(
            (*outputs, self._last_token), {each.untyped_storage().data_ptr() for each in weights}
        )
        return tuple(tensor.detach() for tensor in outputs)

    @property
    def outputs_require_grad(self) -> tuple[bool, ...]:
        """Which of the stage's outputs depend on what gradients are asked for of."""
        return tuple(root is not None for root in self._roots)

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be asked of it."""
        return not self.num_taps and not any(self.outputs_require_grad)

    def pass_hooks(
        self, given: Sequence[Tensor], others: Sequence[Tensor], returned: Sequence[Returned]
    ) -> list[Tensor]:
        """Add a tap, where hooks were given some tensors; return the tensors that they have returned, as part of the graph.

        `others` are tensors that had no gradient until the hooks changed them. A backward pass stops at the tap.
        """
        number, self.num_taps = self.num_taps, self.num_taps + 1
        self._taps.append(_Tap(tuple(map(_Root.of, given)), _Root.of(self._last_token) if number else None))
        tensors = (*given, *others)
        in_place = {each.place for each in returned if each.is_in_place and each.content is None}
        unchanged = tuple(tensor for place, tensor in enumerate(tensors) if place in in_place)
        held = [each.get() for _, each in self._links]
        links = [
            each if each is not None and each.requires_grad and not any(each is other for other in tensors) else None
            for each in held
        ]
        node = _Node(weakref.ref(self), number, len(given), len(others))  # weak, since the graph holds the node
        # What the graph needs of these does not change, though autograd has to take them for changed.
        with torch.autograd._unsafe_preserve_version_counter(unchanged):  # type: ignore[attr-defined] # noqa: SLF001 - no public way
            token, *results = _Hooks.apply(node, returned, self._last_token, *tensors, *links)  # type: ignore[no-untyped-call]
        self._last_token = token
        self._taps[number].returned = tuple(map(_Root.of, results))
        self._links = [(result, _Held.of(result)) for result in results]
        self._held += [each for _, each in self._links]
        return list(results)

    def find_held(self, tensor: Tensor) -> int | None:
        """Return which of the tensors that hooks have returned this is, counted through all taps; None if none.

        -1 is the stage's input, if that is known.
        """
        if self._input is not None and self._input.get() is tensor:
            return -1
        return next((index for index, each in enumerate(self._held) if each.get() is tensor), None)

    def run(
        self,
        tap: int | None,
        gradients: Gradients,
        injected: Gradients = (),
        *,
        keeps_graph: bool,
        reach_tap: ReachTap,
    ) -> Gradients:
        """Run a backward pass to the inputs and return their gradients, given those of the outputs.

        With a `tap`, the pass begins with what the hooks there were given. It calls `reach_tap` at every tap on its way. For what
        is `injected`, see `ReachTap`.
        """
        if tap is not None and tap >= self.num_taps:
            raise ProtocolError(f"a backward pass from tap {tap} was asked for, and there are {self.num_taps}")
        # 1) find where it begins, and where it leads to: along tokens, if there are taps
        roots, token = (self._roots, None) if tap is None else (self._taps[tap].given, self._taps[tap].token)
        if tap is None and self.num_taps:
            token = _Root.of(self._last_token)
        given = [
            (root, gradient.to(self._device))
            for root, gradient in zip(roots, _check_gradients(roots, gradients), strict=True)
            if root is not None and gradient is not None
        ]
        if injected:  # first, as what comes from behind the step does in one graph
            returned = self._before(self.num_taps if tap is None else tap).returned
            given += [
                (root, gradient.to(self._device))
                for root, gradient in zip(returned, _check_gradients(returned, injected), strict=True)
                if root is not None and gradient is not None
            ]
        leaves = [leaf for leaf in self._leaves if leaf is not None]
        if not given:
            return (None,) * len(self._leaves)
        if token is not None:
            given.append((token, torch.zeros(())))
            leaves.append(self._first_token)
        if not leaves:
            return (None,) * len(self._leaves)
        # 2) run it
        self._reach_tap = reach_tap
        try:
            found = iter(
                torch.autograd.grad(
                    [root.edge for root, _ in given],
                    leaves,
                    [gradient for _, gradient in given],
                    retain_graph=keeps_graph,
                    allow_unused=True,
                )
            )
        finally:
            self._reach_tap = None
        if tap is None and not keeps_graph:
            self.num_bytes = 0
        late, self._entry.injected = self._entry.injected or (None,) * len(self._leaves), ()
        return tuple(
            None if leaf is None else _add(each, next(found)) for leaf, each in zip(self._leaves, late, strict=True)
        )

    def _before(self, number: int) -> _Tap:
        return self._taps[number - 1] if number else self._entry

    def stop(self, number: int, gradients: Gradients, linked: Sequence[bool]) -> tuple[Gradients, Gradients]:
        """Wait at a tap for the gradients of what its hooks were given, and for what is to be injected where it is linked."""
        assert self._reach_tap is not None
        tap, before = self._taps[number], self._before(number)
        # 1) add what could not be injected
        late, tap.injected = tap.injected, ()
        if late:
            gradients = tuple(map(_add, late, gradients))
        given, injected = self._reach_tap(number, gradients)
        given = self._placed(_check_gradients(tap.given, given))
        if not injected:
            return given, (None,) * len(linked)
        # 2) inject the rest
        injected = self._placed(_check_gradients(before.returned, injected))
        late = tuple(None if is_linked else each for each, is_linked in zip(injected, linked, strict=True))
        before.injected = late if any(each is not None for each in late) else ()
        return given, tuple(each if is_linked else None for each, is_linked in zip(injected, linked, strict=True))

    def _placed(self, gradients: Gradients) -> Gradients:
        return tuple(None if each is None else each.to(self._device) for each in gradients)


def _add(injected: Tensor | None, found: Tensor | None) -> Tensor | None:
    return found if injected is None else injected if found is None else injected + found


@dataclass(frozen=True, slots=True)
class _Node:
    """Which tap a node of the graph is, and how many tensors of each kind it has."""

    graph: weakref.ref[AutogradGraph]
    number: int
    num_given: int
    num_others: int


class _Hooks(torch.autograd.Function):
    """What hooks have made of tensors: a node whose backward pass is theirs.

    It is linked with what the hooks of the tap before have returned, so that gradients can be injected there before others come.
    """

    @staticmethod
    def forward(
        ctx: Any, node: _Node, returned: Sequence[Returned], _token: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.node = node
        ctx.linked = [each is not None for each in tensors[node.num_given + node.num_others :]]
        results = []
        for place, content, is_in_place in ((each.place, each.content, each.is_in_place) for each in returned):
            result = content
            if place is not None and is_in_place:
                result = tensors[place]
                assert result is not None
                if content is not None:
                    result.copy_(content)
            elif place is not None and content is None:
                given = tensors[place]
                assert given is not None
                result = given.clone()
            assert result is not None
            results.append(result)
        ctx.mark_dirty(*(result for each, result in zip(returned, results, strict=True) if each.is_in_place))
        return torch.zeros(()), *results

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None, *gradients: Tensor | None) -> tuple[Any, ...]:
        node = ctx.node
        graph = node.graph()
        assert graph is not None
        found, injected = graph.stop(node.number, gradients, ctx.linked)
        return (None, None, torch.zeros(()), *found, *(None,) * node.num_others, *injected)


def _check_gradients(roots: Sequence[_Root | None], gradients: Gradients) -> Gradients:
    """Return gradients; raise ProtocolError if they are not those of these tensors."""
    if len(roots) != len(gradients):
        raise ProtocolError(f"{count_text(len(gradients), 'gradient')} arrived of {count_text(len(roots), 'tensor')}")
    for root, gradient in zip(roots, gradients, strict=True):
        if gradient is not None and root is not None and (gradient.shape, gradient.dtype) != (root.shape, root.dtype):
            raise ProtocolError(
                f"a gradient {gradient.dtype} {list(gradient.shape)} arrived of a tensor {root.dtype} {list(root.shape)}"
            )
    return gradients


_saved_names: dict[type[Any], tuple[str, ...]] = {}


def _saved_bytes(outputs: Iterable[Tensor], apart_from: Iterable[int]) -> int:
    """Return the bytes that a graph keeps for its backward pass, apart from storages at some addresses."""
    waiting: list[Any] = [each.grad_fn for each in outputs if each.grad_fn is not None]
    seen = set(waiting)
    counted = set(apart_from)
    num_bytes = 0
    while waiting:
        node = waiting.pop()
        kind = type(node)
        if kind not in _saved_names:
            _saved_names[kind] = tuple(name for name in dir(node) if name.startswith("_saved_"))
        for name in _saved_names[kind]:
            value = getattr(node, name)
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in counted:
                        counted.add(storage.data_ptr())
                        num_bytes += storage.nbytes()
        for onward, _ in node.next_functions:
            if onward is not None and onward not in seen:
                seen.add(onward)
                waiting.append(onward)
    return num_bytes

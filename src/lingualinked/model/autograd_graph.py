"""The autograd graph of one step in one stage: from its inputs to its outputs, by way of what hooks have made of tensors.

Knows torch's autograd; no modules, messages or other stages.
"""

from __future__ import annotations

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

ReachTap = Callable[[int, Gradients], Gradients]
"""Is told the gradients of what the hooks of a tap returned; returns those of what they were given."""


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
    """A place where hooks have run: what they were given, and the token of the part of the graph before it."""

    given: tuple[_Root | None, ...]
    token: _Root | None


class AutogradGraph:
    """The graph of one step; `requires_grad` says of which of the stage's inputs gradients are asked for."""

    def __init__(self, requires_grad: tuple[bool, ...]) -> None:
        self.requires_grad = requires_grad
        self.num_taps = 0
        self.num_bytes = 0  # that it keeps, besides weights
        self._leaves: tuple[Tensor | None, ...] = ()
        self._roots: tuple[_Root | None, ...] = ()
        self._first_token = torch.zeros((), requires_grad=True)
        self._last_token = self._first_token
        self._device = torch.device("cpu")

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
        return tuple(
            tensor if leaf is None else leaf.clone() for tensor, leaf in zip(tensors, self._leaves, strict=True)
        )

    def end(self, outputs: tuple[Tensor, ...], weights: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Complete the graph; return the stage's outputs without it."""
        self._roots = tuple(map(_Root.of, outputs))
        self.num_bytes = _saved_bytes(outputs, {each.untyped_storage().data_ptr() for each in weights})
        return tuple(tensor.detach() for tensor in outputs)

    @property
    def outputs_require_grad(self) -> tuple[bool, ...]:
        """Which of the stage's outputs depend on what gradients are asked for of."""
        return tuple(root is not None for root in self._roots)

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be asked of it."""
        return not self.num_taps and not any(self.outputs_require_grad)

    def run(self, gradients: Gradients, *, keeps_graph: bool) -> Gradients:
        """Run a backward pass from the outputs, whose gradients are given; return those of the inputs."""
        given = [
            (root, gradient)
            for root, gradient in zip(self._roots, _check_gradients(self._roots, gradients), strict=True)
            if root is not None and gradient is not None
        ]
        leaves = [leaf for leaf in self._leaves if leaf is not None]
        if not given or not leaves:
            return (None,) * len(self._leaves)
        found = iter(
            torch.autograd.grad(
                [root.edge for root, _ in given],
                leaves,
                [gradient.to(self._device) for _, gradient in given],
                retain_graph=keeps_graph,
                allow_unused=True,
            )
        )
        return tuple(None if leaf is None else next(found) for leaf in self._leaves)


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

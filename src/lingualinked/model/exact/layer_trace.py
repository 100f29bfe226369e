"""Watches one call of a decoder layer: which of its parts it calls, in which order, and what torch computes besides.

Knows modules and torch's operations; no kernels and no stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lingualinked.model.exact.exact_gate import FasterGate
from lingualinked.model.hf_internals import computing

_COMPUTES_NOTHING = frozenset(
    {
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "view",
        "_unsafe_view",
        "reshape",
        "transpose",
        "narrow",
        "slice",
    }
    | {"unsqueeze", "alias", "detach", "as_strided", "select", "expand", "contiguous"}
)


class Attention(NamedTuple):
    """How a layer has called its attention function."""

    module: nn.Module
    query: Tensor  # [rows, heads, tokens, dim]
    keys: Tensor  # of all tokens
    values: Tensor
    mask: Tensor | None
    arguments: dict[str, Any]


class LayerTrace(NamedTuple):
    """What a layer has called, in order."""

    modules: list[nn.Module]  # those without parts, and those that multiply gates
    operations: list[str]  # of torch: those that compute or copy anything
    attention: list[Attention]
    result: Any


def trace_layer(layer: nn.Module, call: Callable[[], Any]) -> LayerTrace:
    """Call a layer, and return what it has called."""
    trace = LayerTrace([], [], [], [])
    leaves = list(_leaves(layer))

    def record(module: nn.Module, *_: object) -> None:
        trace.modules.append(module)

    handles = [leaf.register_forward_pre_hook(record) for leaf in leaves]
    try:
        with _recorded_attention(trace.attention), _Operations(trace.operations):
            return trace._replace(result=call())
    finally:
        for handle in handles:
            handle.remove()


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, FasterGate) or next(child.children(), None) is None:
            yield child
        else:
            yield from _leaves(child)


class _Operations(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _COMPUTES_NOTHING:
            self._names.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _recorded_attention(calls: list[Attention]) -> Iterator[None]:
    def wrap(attend: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: Any, **kwargs: Any) -> Any:
            calls.append(Attention(module, query, keys, values, mask, kwargs))
            return attend(module, query, keys, values, mask, **kwargs)

        return recorded

    with computing.replaced_attention(wrap, lambda make_mask: make_mask):
        yield

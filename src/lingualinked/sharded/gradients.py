"""Gradients of a step: a node in the user's autograd graph whose backward pass runs in the stages.

Knows torch's autograd in this process, and a handle on the graph in the stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingualinked.cluster.remote_graph import Gradients, RemoteGraph
from lingualinked.errors import ProtocolError, UnsupportedOperationError, WorkerError

if TYPE_CHECKING:
    from lingualinked.sharded.cache import ShardedCache


class StepGradients:
    """The part of the user's graph that a step adds; `inputs` are what the step begins with, as part of that graph."""

    def __init__(self, inputs: Tensor) -> None:
        self.graph: RemoteGraph | None = None  # once the step is sent
        self.requires_grad = inputs.requires_grad
        self.logits_require_grad = False
        self._inputs = inputs

    @classmethod
    def of(cls, inputs: Tensor, cache: ShardedCache, records: tuple[str, ...]) -> StepGradients | None:
        """Return what a step with these inputs adds to the user's graph; None if nothing, as under ``torch.no_grad()``.

        Raises UnsupportedOperationError if gradients would flow where they can't.
        """
        if not torch.is_grad_enabled():
            return None
        if cache.session.kv_has_gradients:
            raise UnsupportedOperationError(
                "past_key_values were computed in a step with gradients, which do not flow through the KV of earlier steps: "
                "call the model under torch.no_grad(), or pass the whole text in one call with use_cache=False"
            )
        if not inputs.requires_grad:
            return None
        for what, is_asked in (
            ("a static KV cache", cache.session.max_cache_len),
            ("output_" + "".join(records[:1]), records),
        ):
            if is_asked:
                raise UnsupportedOperationError(
                    f"{what} in a step with gradients is not supported: leave it out, or call the model under torch.no_grad()"
                )
        return cls(inputs)

    def attach(self, logits: Tensor) -> Tensor:
        """Return the logits of the step as part of the user's graph."""
        assert self.graph is not None
        if not self.logits_require_grad:
            return logits
        attached: Tensor = _Step.apply(self.graph, logits, self._inputs)  # type: ignore[no-untyped-call]
        return attached


class _Step(torch.autograd.Function):
    """A step from its inputs to its logits."""

    @staticmethod
    def forward(ctx: Any, graph: RemoteGraph, logits: Tensor, inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.graph = graph
        ctx.save_for_backward(inputs.detach()[:0])  # so that torch refuses a second pass, unless it keeps the graph
        ctx.size = inputs.shape, inputs.dtype
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise UnsupportedOperationError(
                "create_graph=True: gradients of gradients do not flow through a sharded model; leave it out"
            )
        keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001 - no public getter
        found: Gradients = gradients
        for stage in reversed(range(ctx.graph.num_stages)):
            if all(each is None for each in found):
                return (None, None, None)
            found = ctx.graph.run_stage(stage, found, keeps_graph=keeps_graph)
        [gradient] = found if len(found) == 1 else [None]
        if gradient is not None and (gradient.shape, gradient.dtype) != ctx.size:
            error = ProtocolError(f"the gradient {gradient.dtype} {list(gradient.shape)} arrived of inputs {ctx.size}")
            raise WorkerError(ctx.graph.device(0), f"ProtocolError: {error}") from error
        return None, None, gradient

"""Gradients of a step: nodes in the user's autograd graph whose backward passes run in the stages.

A step is a chain of segments, from its inputs or what hooks have returned to what hooks are given or the logits. Knows torch's
autograd in this process, and a handle on the graph in the stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from lingualinked.cluster.remote_graph import Gradients, RemoteGraph
from lingualinked.errors import ProtocolError, UnsupportedOperationError, WorkerError

if TYPE_CHECKING:
    from lingualinked.sharded.cache import ShardedCache


class _Place(NamedTuple):
    """A tap, where hooks have run: they are numbered in each stage."""

    stage: int
    tap: int


class StepGradients:
    """What a step adds to the user's graph, which its inputs may be part of already."""

    def __init__(self, inputs: Tensor, obstacle: str) -> None:
        self.graph: RemoteGraph | None = None  # once the step is sent
        self.requires_grad = inputs.requires_grad
        self.logits_require_grad = False
        self._obstacle = obstacle
        self._num_taps: Counter[int] = Counter()  # by stage
        self._passes: _Passes | None = None
        # Where the next segment begins: there, it takes these tensors; and the node of the segment before.
        self._begin: _Place | None = None
        self._returned: tuple[Tensor, ...] = (inputs,)
        self._token = torch.zeros(())
        self._is_open = False  # whether a segment has ended at the tap that hooks run at now

    @classmethod
    def of(
        cls, inputs: Tensor, cache: ShardedCache, records: tuple[str, ...], *, has_hooks: bool
    ) -> StepGradients | None:
        """Return what a step with these inputs may add to the user's graph; None if nothing, as under ``torch.no_grad()``.

        Raises UnsupportedOperationError if gradients would flow where they can't.
        """
        if not torch.is_grad_enabled():
            return None
        if cache.session.kv_has_gradients:
            raise UnsupportedOperationError(
                "past_key_values were computed in a step with gradients, which do not flow through the KV of earlier steps: "
                "call the model under torch.no_grad(), or pass the whole text in one call with use_cache=False"
            )
        if not inputs.requires_grad and not has_hooks:
            return None
        obstacle = f"output_{records[0]}" if records else "a static KV cache" if cache.session.max_cache_len else ""
        gradients = cls(inputs, obstacle)
        if inputs.requires_grad:
            gradients.check_flow()
        return gradients

    @property
    def may_flow(self) -> bool:
        """Whether the stages have to keep a graph."""
        return not self._obstacle

    @property
    def flow(self) -> bool:
        """Whether something in the step has gradients, so far."""
        return self._token.requires_grad or any(each.requires_grad for each in self._returned)

    def check_flow(self) -> None:
        """Raise UnsupportedOperationError if there can be no gradients in this step."""
        if self._obstacle:
            raise UnsupportedOperationError(
                f"{self._obstacle} in a step with gradients is not supported: leave it out, or call the model under "
                "torch.no_grad()"
            )

    def give(self, stage: int, tensors: list[Tensor], requires_grad: Sequence[bool]) -> list[Tensor]:
        """Return the tensors that hooks are given at a tap, as part of the user's graph."""
        with_gradients = [tensor for tensor, has_one in zip(tensors, requires_grad, strict=True) if has_one]
        if not with_gradients or not self.flow:
            return tensors
        self._is_open = True
        attached = iter(self._end_segment(_Place(stage, self._num_taps[stage]), with_gradients))
        return [next(attached) if has_one else tensor for tensor, has_one in zip(tensors, requires_grad, strict=True)]

    def take(self, stage: int, returned: Sequence[Tensor]) -> None:
        """Go on with the tensors with gradients that hooks have returned at a tap."""
        if returned:
            self.check_flow()
        elif not self._is_open:
            return
        if self.flow and not self._is_open:
            self._end_segment(_Place(stage, self._num_taps[stage]), [])
        self._is_open = False
        self._begin, self._returned = _Place(stage, self._num_taps[stage]), tuple(returned)
        self._num_taps[stage] += 1

    def end(self, logits: Tensor) -> Tensor:
        """Return the logits of the step as part of the user's graph."""
        return self._end_segment(None, [logits])[0] if self.logits_require_grad and self.flow else logits

    def _end_segment(self, end: _Place | None, tensors: list[Tensor]) -> list[Tensor]:
        assert self.graph is not None
        if self._passes is None:
            self._passes = _Passes(self.graph)
        segment = _Segment(self._passes, self._begin, end)
        self._token, *attached = _SegmentNode.apply(segment, tensors, self._token, *self._returned)  # type: ignore[no-untyped-call]
        return list(attached)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A part of a step between two taps; its inputs, or the logits, where there is none."""

    passes: _Passes
    begin: _Place | None
    end: _Place | None


class _SegmentNode(torch.autograd.Function):
    """A segment of a step. Besides its tensors it takes and returns a token, which stands for what stays in the stages."""

    @staticmethod
    def forward(
        ctx: Any, segment: _Segment, results: list[Tensor], token: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.segment = segment
        ctx.sizes = [(each.shape, each.dtype) for each in inputs]
        ctx.save_for_backward(token)  # so that torch refuses a second pass, unless it retains the graph
        return torch.zeros(()), *results

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None, *gradients: Tensor | None) -> tuple[Any, ...]:
        (token,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise UnsupportedOperationError(
                "create_graph=True: gradients of gradients do not flow through a sharded model; leave it out"
            )
        found = ctx.segment.passes.run(ctx.segment, gradients, ctx.sizes)
        return None, None, torch.zeros_like(token), *found


class _Pass:
    """A backward pass in progress: the stage that it is in, and the tap that it waits at there, if it does."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.stage: int | None = None
        self.waits_at: _Place | None = None


class _Passes:
    """The backward passes through one step, one at a time."""

    def __init__(self, graph: RemoteGraph) -> None:
        self._graph = graph
        self._pass: _Pass | None = None

    def run(self, segment: _Segment, gradients: Gradients, sizes: list[tuple[torch.Size, torch.dtype]]) -> Gradients:
        """Run a pass through a segment, given the gradients of what it ends with; return those of what it begins with."""
        current = self._enter()
        try:
            found = self._run(current, segment, gradients) or (None,) * len(sizes)
        except BaseException:
            self._leave(current)
            raise
        stage = 0 if segment.begin is None else segment.begin.stage
        if len(found) != len(sizes) or any(
            each is not None and (each.shape, each.dtype) != size for each, size in zip(found, sizes, strict=True)
        ):
            self._leave(current)
            came = [None if each is None else (each.dtype, list(each.shape)) for each in found]
            error = ProtocolError(f"the gradients {came} arrived of tensors {sizes}")
            raise WorkerError(self._graph.device(stage), f"ProtocolError: {error}") from error
        return found

    def _run(self, current: _Pass, segment: _Segment, gradients: Gradients) -> Gradients | None:
        keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001 - no public getter
        first = 0 if segment.begin is None else segment.begin.stage
        waited_at, current.waits_at = current.waits_at, None
        stage = current.stage = self._graph.num_stages - 1 if segment.end is None else segment.end.stage
        # 1) go on where the segment behind this one has come to, or begin at the end of this one
        if segment.end is not None and waited_at == segment.end:
            reached = self._graph.resume(stage, gradients)
        else:
            tap = None if segment.end is None else segment.end.tap
            reached = self._graph.run(stage, tap, gradients, keeps_graph=keeps_graph)
        # 2) lead it through the stages to where the segment begins
        while reached.tap is None and stage > first and any(each is not None for each in reached.gradients):
            stage = current.stage = stage - 1
            reached = self._graph.run(stage, None, reached.gradients, keeps_graph=keeps_graph)
        if reached.tap is None:
            current.stage = None
            return reached.gradients if stage == 0 and segment.begin is None else None
        if _Place(stage, reached.tap) != segment.begin:
            error = ProtocolError(f"a backward pass stopped at tap {reached.tap} of stage {stage}")
            raise WorkerError(self._graph.device(stage), f"ProtocolError: {error}") from error
        current.waits_at = segment.begin
        return reached.gradients

    def _enter(self) -> _Pass:
        """Return the pass that autograd runs at the moment."""
        task = torch._C._current_graph_task_id()  # noqa: SLF001 - no public getter
        if self._pass is None or self._pass.task != task:
            if self._pass is not None:  # it has failed elsewhere
                self._leave(self._pass)
            self._pass = current = _Pass(task)
            Variable._execution_engine.queue_callback(lambda: self._leave(current))  # noqa: SLF001 - as DDP
        return self._pass

    def _leave(self, ended: _Pass) -> None:
        """End a pass in the stage where it waits: what else it leads to is not asked for."""
        if ended.stage is not None:
            self._graph.abandon(ended.stage)
            ended.stage = None
        if self._pass is ended:
            self._pass = None

"""Gradients of a step: nodes in the user's autograd graph whose backward passes run in the stages.

A step is a chain of segments, from its inputs or what hooks have returned to what hooks are given or the logits. Knows torch's
autograd in this process, and a handle on the graph in the stages.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge

from lingualinked.cluster.steps.remote_graph import Gradients, RemoteGraph
from lingualinked.errors import ProtocolError, UnsupportedOperationError, WorkerError
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from lingualinked.sharded.calling.cache import ShardedCache


_Sizes = list[tuple[torch.Size, torch.dtype]]


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
        self.ends_at_tap: tuple[bool, ...] = ()
        self._obstacle = obstacle
        self._num_taps: Counter[int] = Counter()  # by stage
        self._passes: _Passes | None = None
        # Where the next segment begins: there, it takes these tensors; and the node of the segment before.
        self._begin: _Place | None = None
        self._returned: tuple[Tensor, ...] = (inputs,)
        self._inputs = inputs
        self._token = torch.zeros(())
        self._held: defaultdict[int, list[Tensor]] = defaultdict(list)  # all that hooks have returned, by stage
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

    def attach_tensors(
        self, stage: int, tensors: list[Tensor], requires_grad: Sequence[bool], held: Sequence[int | None]
    ) -> list[Tensor]:
        """Return the tensors that hooks are given at a tap, as part of the user's graph.

        Those that are `held` are tensors that hooks have returned before in this stage, by their number.
        """
        if not self.may_flow:
            return tensors
        if not len(tensors) == len(requires_grad) == len(held):
            raise ProtocolError(
                f"{count_text(len(tensors), 'tensor')} arrived, and {len(requires_grad)} have gradients or have not"
            )
        before = self._held[stage - 1] if stage else [self._inputs]
        known = dict(enumerate(self._held[stage]))
        if before:
            known[-1] = before[-1]
        if any(number is not None and number not in known for number in held):
            raise ProtocolError(f"hooks are said to have returned others than {count_text(len(known), 'tensor')}")
        is_new = [has_one and number is None and self.flow for has_one, number in zip(requires_grad, held, strict=True)]
        new = [tensor for tensor, takes in zip(tensors, is_new, strict=True) if takes]
        self._is_open = bool(new)
        attached = iter(self._end_segment(_Place(stage, self._num_taps[stage]), new) if new else ())
        return [
            next(attached) if takes else tensor if number is None else known[number]
            for tensor, takes, number in zip(tensors, is_new, held, strict=True)
        ]

    def resume_with(self, stage: int, returned: Sequence[Tensor]) -> None:
        """Go on with the tensors with gradients that hooks have returned at a tap."""
        if returned:
            self.check_flow()
        elif not self._is_open:
            return
        if self.flow and not self._is_open:
            self._end_segment(_Place(stage, self._num_taps[stage]), [])
        self._is_open = False
        self._begin, self._returned = _Place(stage, self._num_taps[stage]), tuple(returned)
        self._held[stage] += returned
        self._num_taps[stage] += 1

    def end(self, logits: Tensor) -> Tensor:
        """Return the logits of the step as part of the user's graph."""
        attached = [logits]
        if self.logits_require_grad and self.flow:
            attached = self._end_segment(None, attached)
        if self._passes is not None:
            ends = {stage for stage, is_end in enumerate(self.ends_at_tap) if is_end}
            self._passes.at_ends = {_Place(stage, self._num_taps[stage] - 1) for stage in ends}
        return attached[0]

    def _end_segment(self, end: _Place | None, tensors: list[Tensor]) -> list[Tensor]:
        assert self.graph is not None
        if self._passes is None:
            self._passes = _Passes(self.graph)
        inputs = self._returned
        is_late = len(inputs) == 1 and inputs[0].requires_grad
        segment = _Segment(self._passes, self._begin, end, is_late)
        self._token, *attached = _SegmentNode.apply(segment, tensors, self._passes.probe, self._token, *inputs)  # type: ignore[no-untyped-call]
        if is_late:
            _hook_first(inputs[0], segment)
        return list(attached)


def _hook_first(tensor: Tensor, segment: _Segment) -> None:
    """Run a segment's backward pass as soon as all other gradients of the tensor that it begins with are there.

    They are then injected before those that come through the stages, as in one graph: additions round.
    """
    passes, place = weakref.ref(segment.passes), segment.begin

    def complete(gradient: Tensor) -> Tensor | None:
        found = passes()
        return None if found is None else found.run_late(place, gradient)

    handle = tensor.register_hook(complete)
    weakref.finalize(segment.passes, handle.remove).atexit = False  # the tensor may last, and be used in many steps
    hooks = tensor._backward_hooks  # noqa: SLF001 - no public way to come before those that the user has registered
    assert hooks is not None
    for number in [each for each in hooks if each != handle.id]:
        hooks[number] = hooks.pop(number)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A part of a step between two taps; its inputs, or the logits, where there is none."""

    passes: _Passes
    begin: _Place | None
    end: _Place | None
    is_late: bool  # whether its backward pass waits for the other gradients of what it begins with


class _SegmentNode(torch.autograd.Function):
    """A segment of a step. Besides its tensors it takes and returns a token, which stands for what stays in the stages."""

    @staticmethod
    def forward(
        ctx: Any, segment: _Segment, results: list[Tensor], _probe: Tensor, token: Tensor, *inputs: Tensor
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
        if ctx.segment.is_late and ctx.segment.passes.runs_all():
            found = ctx.segment.passes.put_off(ctx.segment, gradients, ctx.sizes)
        else:
            found = ctx.segment.passes.run(ctx.segment, gradients, ctx.sizes)
        return None, None, None, torch.zeros_like(token), *found


class _Pass:
    """A backward pass in progress: the stage that it is in, the tap that it waits at there, if it does, and what is put off."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.stage: int | None = None
        self.waits_at: _Place | None = None
        self.put_off: tuple[_Segment, Gradients, _Sizes] | None = None


class _Passes:
    """The backward passes through one step, one at a time."""

    def __init__(self, graph: RemoteGraph) -> None:
        self._graph = graph
        self.at_ends: set[_Place] = set()  # taps whose tensor is the output of their stage, once the step has ended
        self.probe = torch.zeros((), requires_grad=True)  # part of the user's graph
        self._probe_node = get_gradient_edge(self.probe).node
        self._pass: _Pass | None = None

    def runs_all(self) -> bool:
        """Return whether the pass in progress is for all leaves: one for some tensors may take their gradients before hooks do."""
        return torch._C._will_engine_execute_node(self._probe_node)  # noqa: SLF001 - no public name

    def put_off(self, segment: _Segment, gradients: Gradients, sizes: _Sizes) -> Gradients:
        """Run a pass through a segment when `run_late` is called, or another segment is run; return a gradient that adds nothing."""
        self._run_rest(self._enter())
        self._enter().put_off = segment, gradients, sizes
        [(shape, dtype)] = sizes
        return (torch.full((), -0.0, dtype=dtype).expand(shape),)

    def run_late(self, place: _Place | None, gradient: Tensor) -> Tensor | None:
        """Run a pass through the segment that begins at a place; return the whole gradient of what it begins with.

        `gradient` is what of it comes from elsewhere. Returns None if the pass does not lead there.
        """
        current = self._enter()
        if current.put_off is None or current.put_off[0].begin != place:
            return None
        put_off, current.put_off = current.put_off, None
        [found] = self._run_checked(current, *put_off, (gradient,))
        return found

    def run(self, segment: _Segment, gradients: Gradients, sizes: _Sizes) -> Gradients:
        """Run a pass through a segment, given the gradients of what it ends with; return those of what it begins with."""
        current = self._enter()
        self._run_rest(current)
        return self._run_checked(current, segment, gradients, sizes, ())

    def _run_rest(self, current: _Pass) -> None:
        """Run what is put off: nobody asks for its gradient, but what is in front of it does."""
        put_off, current.put_off = current.put_off, None
        if put_off is not None:
            self._run_checked(current, *put_off, ())

    def _run_checked(
        self, current: _Pass, segment: _Segment, gradients: Gradients, sizes: _Sizes, injected: Gradients
    ) -> Gradients:
        try:
            found = self._run(current, segment, gradients, injected) or (None,) * len(sizes)
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

    def _run(self, current: _Pass, segment: _Segment, gradients: Gradients, injected: Gradients) -> Gradients | None:
        keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001 - no public getter
        first = inject_in = 0 if segment.begin is None else segment.begin.stage
        if segment.begin in self.at_ends:
            inject_in = first + 1  # the tensor is that stage's input
        waited_at, current.waits_at = current.waits_at, None
        stage = current.stage = self._graph.num_stages - 1 if segment.end is None else segment.end.stage
        # 1) go on where the segment behind this one has come to, or begin at the end of this one
        if segment.end is not None and waited_at == segment.end:
            reached = self._graph.resume(stage, gradients, injected if stage == inject_in else ())
        else:
            tap = None if segment.end is None else segment.end.tap
            reached = self._graph.run(
                stage, tap, gradients, injected if stage == inject_in else (), keeps_graph=keeps_graph
            )
        # 2) lead it through the stages to where the segment begins
        while reached.tap is None and stage > first and any(each is not None for each in reached.gradients):
            stage = current.stage = stage - 1
            reached = self._graph.run(
                stage, None, reached.gradients, injected if stage == inject_in else (), keeps_graph=keeps_graph
            )
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
        ended.put_off = None
        if ended.stage is not None:
            self._graph.abandon(ended.stage)
            ended.stage = None
        if self._pass is ended:
            self._pass = None

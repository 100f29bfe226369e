"""The caller's handle on the autograd graph that one step has left in its stages.

Knows messages and devices; neither torch's autograd in this process nor what the gradients are for.
"""

from __future__ import annotations

import weakref
from typing import Protocol, cast

from torch import Tensor

from lingualinked.cluster.engine import Engine
from lingualinked.cluster.pending import result_of
from lingualinked.cluster.route import Route
from lingualinked.errors import ProtocolError, WorkerError
from lingualinked.interrupts import interruptible, uninterrupted
from lingualinked.model.torch_settings import read_torch_settings
from lingualinked.protocol.gradients import BackwardDone, FreeGraph, RunBackward
from lingualinked.protocol.steps import Step

Gradients = tuple[Tensor | None, ...]
"""Of several tensors, in order; None where nothing depends on a tensor."""


class GraphUser(Protocol):
    """What asks for gradients of a step: of the step's inputs, or of what its hooks return."""

    requires_grad: bool  # whether gradients of the inputs are asked for
    graph: RemoteGraph | None  # of the step, from when it is sent
    logits_require_grad: bool  # once the step has ended


class RemoteGraph:
    """The graph of one step, in all stages; they free it with this handle."""

    def __init__(self, engine: Engine, step: Step, route: Route, timeout_s: float) -> None:
        self._engine = engine
        self._step = step.model, step.session, step.number
        self._route = route
        self._timeout_s = timeout_s
        self._finalizer = weakref.finalize(self, _free, engine, self._step, route)
        self._finalizer.atexit = False

    @property
    def num_stages(self) -> int:
        """How many stages the step has passed through."""
        return len(self._route.stage_devices)

    @interruptible
    def run_stage(self, stage: int, gradients: Gradients, *, keeps_graph: bool) -> Gradients:
        """Run a backward pass through one stage, given the gradients of its outputs; return those of its inputs.

        Raises ArgumentError if the stage has freed the graph, as it does when its layers move.
        """
        device = self._route.stage_devices[stage]
        model, session, number = self._step
        tensors = tuple(each for each in gradients if each is not None)
        message = RunBackward(
            request=self._engine.next_request(),
            model=model,
            plan_version=self._route.version,
            stage=stage,
            session=session,
            number=number,
            given=tuple(each is not None for each in gradients),
            keeps_graph=keeps_graph,
            torch_settings=tuple(read_torch_settings().items()),
        )
        answer = result_of(self._engine.request(device, message, "a backward pass", self._timeout_s, tensors=tensors))
        done, found = cast("tuple[BackwardDone, tuple[Tensor, ...]]", answer)
        if len(found) != sum(done.given):
            error = ProtocolError(f"{len(found)} gradients arrived, and {sum(done.given)} are announced")
            raise WorkerError(device, f"ProtocolError: {error}") from error
        rest = iter(found)
        return tuple(next(rest) if is_given else None for is_given in done.given)

    def device(self, stage: int) -> str:
        """Return the device of a stage."""
        return self._route.stage_devices[stage]


@uninterrupted
def _free(engine: Engine, step: tuple[int, int, int], route: Route) -> None:
    model, session, number = step
    for stage, device in enumerate(route.stage_devices):
        message = FreeGraph(model=model, plan_version=route.version, stage=stage, session=session, number=number)
        engine.send_command(device, message)

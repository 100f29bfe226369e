"""The caller's handle on the autograd graph that one step has left in its stages.

Knows messages and devices; neither torch's autograd in this process nor what the gradients are for.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Protocol, cast

from torch import Tensor

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import result_of
from lingualinked.cluster.plans.route import Route
from lingualinked.errors import ProtocolError, WorkerError
from lingualinked.interrupts import interruptible, uninterrupted
from lingualinked.model.process.torch_settings import read_torch_settings
from lingualinked.protocol.gradients import AbandonBackward, BackwardDone, FreeGraph, ResumeBackward, RunBackward
from lingualinked.protocol.steps import Step
from lingualinked.quantities import count_text

Gradients = tuple[Tensor | None, ...]
"""Of several tensors, in order; None where nothing depends on a tensor."""


class GraphUser(Protocol):
    """What asks for gradients of a step: of the step's inputs, or of what its hooks return."""

    requires_grad: bool  # whether gradients of the inputs are asked for
    graph: RemoteGraph | None  # of the step, from when it is sent
    logits_require_grad: bool  # once the step has ended
    ends_at_tap: tuple[bool, ...]  # likewise; see `lingualinked.protocol.steps.Step`

    @property
    def may_flow(self) -> bool:
        """Whether the stages have to keep a graph."""

    @property
    def flow(self) -> bool:
        """Whether something in the step has gradients, so far."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reached:
    """Where a backward pass has come to in a stage: a tap, or the stage's inputs (None), and the gradients there."""

    tap: int | None
    gradients: Gradients


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

    def run(
        self, stage: int, tap: int | None, gradients: Gradients, injected: Gradients, *, keeps_graph: bool
    ) -> Reached:
        """Run a backward pass through one stage, from a tap, or from the stage's outputs; return where it comes to.

        Gradients are `injected` of what the hooks of the tap before in this stage have returned, if there are any.
        Raises ArgumentError if the stage has freed the graph, as it does when its layers move.
        """
        message = RunBackward(
            request=self._engine.next_request(),
            **self._place(stage),
            tap=tap,
            given=_present(gradients),
            injected=_present(injected),
            keeps_graph=keeps_graph,
            torch_settings=tuple(read_torch_settings().items()),
        )
        return self._ask(stage, message, (*gradients, *injected))

    def resume(self, stage: int, gradients: Gradients, injected: Gradients) -> Reached:
        """Go on with a backward pass that has come to a tap, given the gradients of what hooks were given there."""
        message = ResumeBackward(
            request=self._engine.next_request(),
            **self._place(stage),
            given=_present(gradients),
            injected=_present(injected),
        )
        return self._ask(stage, message, (*gradients, *injected))

    def abandon(self, stage: int) -> None:
        """End a backward pass that has come to a tap, or is on its way there."""
        self._engine.send_command(self.device(stage), AbandonBackward(**self._place(stage)))

    def device(self, stage: int) -> str:
        """Return the device of a stage."""
        return self._route.stage_devices[stage]

    def _place(self, stage: int) -> dict[str, int]:
        model, session, number = self._step
        return {
            "model": model,
            "plan_version": self._route.version,
            "stage": stage,
            "session": session,
            "number": number,
        }

    @interruptible
    def _ask(self, stage: int, message: RunBackward | ResumeBackward, gradients: Gradients) -> Reached:
        device = self.device(stage)
        tensors = tuple(each.detach().cpu().contiguous() for each in gradients if each is not None)
        answer = result_of(self._engine.request(device, message, "a backward pass", self._timeout_s, tensors=tensors))
        done, found = cast("tuple[BackwardDone, tuple[Tensor, ...]]", answer)
        if len(found) != sum(done.given):
            error = ProtocolError(f"{count_text(len(found), 'gradient')} arrived, and {sum(done.given)} are announced")
            raise WorkerError(device, f"ProtocolError: {error}") from error
        rest = iter(found)
        return Reached(done.tap, tuple(next(rest) if is_given else None for is_given in done.given))


def _present(gradients: Gradients) -> tuple[bool, ...]:
    return tuple(each is not None for each in gradients)


@uninterrupted
def _free(engine: Engine, step: tuple[int, int, int], route: Route) -> None:
    model, session, number = step
    for stage, device in enumerate(route.stage_devices):
        message = FreeGraph(model=model, plan_version=route.version, stage=stage, session=session, number=number)
        engine.send_command(device, message)

"""The caller's side of a step that stops at hooked modules: an event for each stop, and an answer to each event.

Knows messages and descriptions of calls; neither modules nor the functions that are called.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import result_of
from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.steps.step_reply import HookEvent, StepReply
from lingualinked.errors import ProtocolError, WorkerError
from lingualinked.model.hooks.hook_data import HookPoint
from lingualinked.protocol.hooking import HookAnswered
from lingualinked.protocol.steps import Step


class StepHooks(Protocol):
    """What runs the hooks of a step."""

    def points(self) -> tuple[HookPoint, ...]:
        """Return the modules that have hooks at the moment."""

    def run(self, step: HookedStep) -> StepReply:
        """Run the hooks of a step as it reaches them; return its reply."""


class HookedStep:
    """A step in progress; `on_failure` is called as soon as it has failed, even while hooks run."""

    def __init__(self, engine: Engine, step: Step, route: Route, on_failure: Callable[[], None]) -> None:
        self.spans = route.plan.spans
        self._engine = engine
        self._step = step
        self._devices = route.stage_devices
        self._on_failure = on_failure
        self._paused: HookEvent | None = None
        self._future: concurrent.futures.Future[object] | None = None
        self.points = step.hooks

    def start(self, tensors: tuple[Tensor, ...], timeout_s: float) -> None:
        """Send the step to the first stage."""
        self._future = self._engine.step(self._devices, self._step, tensors, timeout_s)

    def next_event(self) -> HookEvent | StepReply:
        """Wait until the step stops at a hooked module, or its reply has come."""
        futures, self._future = [self._future], None  # no frame that an error passes may name it
        outcome = result_of(cast("concurrent.futures.Future[object]", futures.pop()))
        if isinstance(outcome, StepReply):
            return outcome
        event, self._future = cast("tuple[HookEvent, concurrent.futures.Future[object]]", outcome)
        self._paused = event
        self._future.add_done_callback(self._end_if_failed)
        if (event.message.stage, event.device) not in enumerate(self._devices):
            error = ProtocolError(
                f"a step stopped at {event.message.path!r} on stage {event.message.stage}, which runs elsewhere"
            )
            raise WorkerError(event.device, f"ProtocolError: {error}") from error
        return event

    def answer(self, tensors: tuple[Tensor, ...], points: tuple[HookPoint, ...], **changes: Any) -> None:
        """Let the step go on with what hooks have made of the last event."""
        event, self._paused = self._paused, None
        assert event is not None
        changed = None if points == self.points else points
        self.points = points
        self._engine.answer_hooks(event.device, self._answer(event, points=changed, **changes), tensors)

    def abandon(self) -> None:
        """End the step in the worker where it is paused."""
        event, self._paused, self._future = self._paused, None, None
        if event is not None:
            self._engine.send_command(event.device, self._answer(event, goes_on=False))

    def _answer(self, event: HookEvent, *, goes_on: bool = True, **changes: Any) -> HookAnswered:
        return HookAnswered(
            model=self._step.model,
            plan_version=self._step.plan_version,
            stage=event.message.stage,
            session=self._step.session,
            number=self._step.number,
            goes_on=goes_on,
            **changes,
        )

    def _end_if_failed(self, future: concurrent.futures.Future[object]) -> None:
        if future.exception() is not None:
            self._on_failure()

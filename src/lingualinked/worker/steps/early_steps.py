"""Steps that have come before they can run: their session has still to move here, or other tensors of theirs to arrive.

Knows messages and stages; neither sockets nor how steps run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.steps import ShortcutTensors, Step
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey

_MOST_BYTES = 1 << 30
_MOST_STEPS = 1 << 16
"""Of all sessions together, and the bytes of their messages."""


class EarlySteps:
    """Passes steps to `serve` as soon as they can run; until then they wait, each session's in order."""

    def __init__(self, stages: HostedStages, serve: Callable[[Step, Delivery], None]) -> None:
        self._stages = stages
        self._serve = serve
        self._waiting: dict[tuple[int, int, int], list[tuple[Step, Delivery]]] = {}  # by model, plan version, session
        self._num_steps = self._num_bytes = 0

    def receive(self, step: Step, delivery: Delivery) -> None:
        """Serve a step, or let it wait; raise ProtocolError if it has run already, or too many wait."""
        key = (step.model, step.plan_version, step.session)
        stage = StageKey(step.model, step.plan_version, step.stage)
        is_behind = any(other.stage == step.stage for other, _ in self._waiting.get(key, ()))
        if not is_behind and self._stages.is_due(stage, step.session, step.number):
            self._serve(step, delivery)
            return
        if self._num_steps >= _MOST_STEPS or self._num_bytes + delivery.num_bytes > _MOST_BYTES:
            raise ProtocolError(f"step {step.number} of session {step.session} came too early, and too many steps wait")
        self._keep(step, delivery)

    def receive_shortcuts(self, message: ShortcutTensors, tensors: tuple[Tensor, ...]) -> None:
        """Keep what an earlier stage has made for a step, and serve the step if it waits for nothing else.

        And steps that fail now, since what had come for them is dropped.
        """
        key = StageKey(message.model, message.plan_version, message.stage)
        for session in sorted(self._stages.get_stage(key).shortcuts.receive(message, tensors)):
            self.serve_due(message.model, message.plan_version, session)

    def serve_due(self, model: int, plan_version: int, session: int) -> None:
        """Serve the steps of a session that wait, as far as they can run now."""
        for step, delivery in self._take((model, plan_version, session)):
            self.receive(step, delivery)

    def drop_session(self, model: int, plan_version: int, session: int) -> None:
        """Forget the steps of a session."""
        self._take((model, plan_version, session))

    def remove_lost(self, model: int) -> Iterator[tuple[Step, Delivery]]:
        """Yield the steps of a model whose session will not move here, or whose stage is gone; they wait no longer."""
        for key in [key for key in self._waiting if key[0] == model]:
            for step, delivery in self._take(key):
                if self._stages.is_lost(StageKey(step.model, step.plan_version, step.stage), step.session):
                    yield step, delivery
                else:
                    self._keep(step, delivery)

    def _keep(self, step: Step, delivery: Delivery) -> None:
        self._waiting.setdefault((step.model, step.plan_version, step.session), []).append((step, delivery))
        self._num_steps, self._num_bytes = self._num_steps + 1, self._num_bytes + delivery.num_bytes

    def _take(self, key: tuple[int, int, int]) -> list[tuple[Step, Delivery]]:
        taken = self._waiting.pop(key, [])
        self._num_steps -= len(taken)
        self._num_bytes -= sum(delivery.num_bytes for _, delivery in taken)
        return taken

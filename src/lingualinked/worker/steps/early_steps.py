"""Steps that have come before they can run: their session has still to move here, or other tensors of theirs to arrive.

Knows messages and stages; neither sockets nor how steps run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from lingualinked.protocol.steps import ShortcutTensors, Step
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey


class EarlySteps:
    """Passes steps to `serve` as soon as they can run; until then they wait, each session's in order."""

    def __init__(self, stages: HostedStages, serve: Callable[[Step, Delivery], None]) -> None:
        self._stages = stages
        self._serve = serve
        self._waiting: dict[tuple[int, int, int], list[tuple[Step, Delivery]]] = {}  # by model, plan version, session

    def receive(self, step: Step, delivery: Delivery) -> None:
        """Serve a step, or let it wait; raise ProtocolError if it has run already."""
        if self._stages.is_due(StageKey(step.model, step.plan_version, step.stage), step.session, step.number):
            self._serve(step, delivery)
        else:
            self._waiting.setdefault((step.model, step.plan_version, step.session), []).append((step, delivery))

    def receive_shortcuts(self, message: ShortcutTensors, tensors: tuple[Tensor, ...]) -> None:
        """Keep what an earlier stage has made for a step, and serve the step if it waits for nothing else.

        And steps that fail now, since what had come for them is dropped.
        """
        key = StageKey(message.model, message.plan_version, message.stage)
        for session in sorted(self._stages.get_stage(key).shortcuts.receive(message, tensors)):
            self.serve_due(message.model, message.plan_version, session)

    def serve_due(self, model: int, plan_version: int, session: int) -> None:
        """Serve the steps of a session that wait, as far as they can run now."""
        for step, delivery in self._waiting.pop((model, plan_version, session), ()):
            self.receive(step, delivery)

    def drop_session(self, model: int, plan_version: int, session: int) -> None:
        """Forget the steps of a session."""
        self._waiting.pop((model, plan_version, session), None)

    def remove_model(self, model: int) -> Iterator[tuple[Step, Delivery]]:
        """Yield the steps of a model that wait, which do so no longer."""
        for key in [key for key in self._waiting if key[0] == model]:
            yield from self._waiting.pop(key)

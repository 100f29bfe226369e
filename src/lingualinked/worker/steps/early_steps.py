"""Steps that have come before they can run: their session has still to move here, or other tensors of theirs to arrive.

Knows messages; neither stages nor sessions.
"""

from __future__ import annotations

from collections.abc import Iterator

from lingualinked.protocol.steps import Step
from lingualinked.transport.wire.delivery import Delivery

Waiting = tuple[Step, Delivery]


class EarlySteps:
    """Steps that wait, by model, plan version and session, each session's in order."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int, int], list[Waiting]] = {}

    def add(self, step: Step, delivery: Delivery) -> None:
        """Let a step wait."""
        self._waiting.setdefault((step.model, step.plan_version, step.session), []).append((step, delivery))

    def remove(self, model: int, plan_version: int, session: int) -> list[Waiting]:
        """Return the steps of a session that wait, which do so no longer."""
        return self._waiting.pop((model, plan_version, session), [])

    def remove_model(self, model: int) -> Iterator[Waiting]:
        """Yield the steps of a model that wait, which do so no longer."""
        for key in [key for key in self._waiting if key[0] == model]:
            yield from self._waiting.pop(key)

"""What all kinds of sessions share: a step is one that is started, and finished at once.

Knows nothing of what a session consists of.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Protocol

from lingualinked.cluster.runs.joined_run import JoinedRun
from lingualinked.cluster.steps.step_in_flight import StepOptions

if TYPE_CHECKING:
    from torch import Tensor

    from lingualinked.cluster.steps.recorded import Recorded

PLAIN = StepOptions()
"""Those of a step that does nothing beside computing logits."""


class StartedStep(Protocol):
    """A step in flight; see `lingualinked.cluster.steps.step_in_flight.StepInFlight`."""

    @property
    def no_logits(self) -> tuple[Tensor, Recorded]:
        """What a step that wants no logits gives."""

    def finish(self) -> tuple[Tensor, Recorded]:
        """Wait for the answer; return the logits, ``[rows, kept tokens, vocabulary]``, and what was recorded."""


class SteppedSession(abc.ABC):
    """A session of any kind: whole, or of several sessions; used by one thread at a time."""

    @abc.abstractmethod
    def start_step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: StepOptions = PLAIN,
    ) -> StartedStep | JoinedRun:
        """Send a step, as `step` does, to be finished later by the same thread."""

    def step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: StepOptions = PLAIN,
    ) -> tuple[Tensor, Recorded]:
        """Run one step through all stages; return its logits, ``[rows, kept tokens, vocabulary]``, and what was recorded.

        Inputs are token ids, int64 ``[rows, tokens]``, or embeddings, ``[rows, tokens, hidden]``; the mask is int64
        ``[rows, past + tokens]``, and positions are int64 ``[1 or rows, tokens]``. ``logits_to_keep`` is as in
        transformers: 0 for all positions, N for the last N, or indices.

        If the KV budget would be exceeded, the session goes on as it was; after every other error of a step it has
        ended. What broke it between two steps is raised by the next one itself, once. A step that wants no logits is not waited for:
        the next one raises what it would.
        """
        flight = self.start_step(inputs, attention_mask, position_ids, logits_to_keep, options)
        assert not isinstance(flight, JoinedRun), "who asks for a run starts the step"
        return flight.finish() if options.wants_logits else flight.no_logits

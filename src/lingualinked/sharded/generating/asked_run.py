"""What a decoding loop asks of the next step: that the stages choose the tokens behind it, and go on with them.

Knows the shapes of a step and what follows it; neither the loop nor what else a step does.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lingualinked.cluster.runs.joined_run import JoinedRun
from lingualinked.cluster.runs.run_in_flight import RunInFlight
from lingualinked.cluster.runs.run_request import RunRequest
from lingualinked.cluster.sessions.any_session import AnySession
from lingualinked.cluster.steps.recorded import Recorded
from lingualinked.cluster.steps.step_in_flight import StepOptions

_asked: contextvars.ContextVar[AskedRun | None] = contextvars.ContextVar("asked run", default=None)


@dataclasses.dataclass(slots=True)
class AskedRun:
    """A run that is to begin with the step of a model whose inputs end with the text; ``flight`` once it has begun."""

    model: Any
    num_tokens: int  # of the text with the step
    make: Callable[[int], RunRequest]  # for at most so many steps
    most_steps: int
    flight: RunInFlight | JoinedRun | None = None

    def request(self, num_past: int, num_new: int, max_cache_len: int, num_positions: int | None) -> RunRequest | None:
        """Return what to ask of a step; None if it is a part of a prompt, or there is no room for what follows."""
        if num_past + num_new != self.num_tokens:
            return None
        limits = [limit for limit in (max_cache_len or None, num_positions) if limit is not None]
        room = min((limit - self.num_tokens + 1 for limit in limits), default=self.most_steps)
        return self.make(max(1, min(room, self.most_steps)))


def step_as_asked(
    asked: AskedRun | None,
    session: AnySession,
    tensors: tuple[Tensor, Tensor | None, Tensor | None, int | Tensor],
    options: StepOptions,
    num_positions: int | None,
) -> tuple[Tensor | None, Recorded]:
    """Run a step as `Session.step` does; if it has begun the run that is asked for, there are no logits.

    ``num_positions`` are those that a model has learned.
    """
    if asked is not None:
        num_new = tensors[0].shape[1]
        request = asked.request(session.num_tokens, num_new, session.max_cache_len, num_positions)
        options = dataclasses.replace(options, run=request)
    if options.run is None:
        return session.step(*tensors, options)
    step = session.start_step(*tensors, options)
    if isinstance(step, RunInFlight | JoinedRun):
        assert asked is not None
        asked.flight = step
        return None, {}
    return step.finish()


@contextlib.contextmanager
def asking(run: AskedRun | None) -> Iterator[None]:
    """Ask for a run in this context."""
    token = _asked.set(run)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_run(model: object) -> AskedRun | None:
    """Return the run that is asked of this model in this context, and has not begun."""
    asked = _asked.get()
    return asked if asked is not None and asked.model is model and asked.flight is None else None

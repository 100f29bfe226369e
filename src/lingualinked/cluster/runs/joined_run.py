"""The runs of a batch's microbatches, whose tokens the caller takes as those of one run.

Knows runs and the rows of each; neither messages nor what is done with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lingualinked.cluster.runs.run_in_flight import RunInFlight, TakenTokens
from lingualinked.cluster.steps.step_in_flight import StepInFlight

Result = TypeVar("Result")


class JoinedRun:
    """A run of each microbatch; see `lingualinked.cluster.runs.run_in_flight.RunInFlight`.

    A microbatch of which no run could begin has its first step in flight alone.
    """

    def __init__(
        self, parts: Sequence[RunInFlight | StepInFlight], sizes: Sequence[int], end_session: Callable[[], None]
    ) -> None:
        self.is_finished = False
        self._runs = [part if isinstance(part, RunInFlight) else _SingleStep(part) for part in parts]
        self._sizes, self._end_session = sizes, end_session

    @property
    def has_chosen(self) -> bool:
        """Whether the stages have chosen what `await_tokens` has found, of all rows."""
        return all(run.has_chosen for run in self._runs)

    def await_tokens(self) -> bool:
        """Wait for the tokens of all rows; return False if a run has ended and all of its tokens are taken."""
        return all(self._call_each(lambda run: run.await_tokens()))

    def take_tokens(self) -> TakenTokens:
        """Take the tokens of all rows; where some could not be chosen, logits of all, of which the chosen ones are the likeliest."""
        taken = self._call_each(lambda run: run.take_tokens())
        tokens = [each.tokens for each in taken if each.tokens is not None]
        if len(tokens) == len(taken):
            return TakenTokens(torch.cat(tokens), None)
        vocabulary = max(each.logits.shape[-1] for each in taken if each.logits is not None)
        sizes = zip(taken, self._sizes, strict=True)
        return TakenTokens(None, torch.cat([_as_logits(each, size, vocabulary) for each, size in sizes]))

    def finish(self) -> None:
        """End all runs, and drop what the stages have computed beyond the tokens that were taken."""
        if not self.is_finished:
            for run in self._runs:
                run.end()
            self._call_each(lambda run: run.finish())
            self.is_finished = True

    def _call_each(self, call: Callable[[RunInFlight | _SingleStep], Result]) -> list[Result]:
        """Call something of each run; if one has failed, the session ends."""
        try:
            return [call(run) for run in self._runs]
        except BaseException:
            self.is_finished = True
            self._end_session()
            raise


class _SingleStep:
    """A step of which no run could begin, as a run of one step."""

    has_chosen = False

    def __init__(self, step: StepInFlight) -> None:
        self.is_finished = False
        self._step = step

    def await_tokens(self) -> bool:
        """Return whether its logits are still to be taken."""
        return not self.is_finished

    def take_tokens(self) -> TakenTokens:
        """Wait for its logits."""
        self.is_finished = True
        return TakenTokens(None, self._step.finish()[0])

    def end(self) -> None:
        """Do nothing: no step follows."""

    def finish(self) -> None:
        """Wait for its logits, if they are not taken."""
        if not self.is_finished:
            self.take_tokens()


def _as_logits(chosen: TakenTokens, num_rows: int, vocabulary: int) -> Tensor:
    if chosen.logits is not None:
        return chosen.logits[:, -1:]
    assert chosen.tokens is not None
    logits = torch.full((num_rows, 1, vocabulary), -torch.inf)
    return logits.scatter(-1, chosen.tokens.view(num_rows, 1, 1), 0.0)

"""The runs of the sessions whose last stage is here: chooses their tokens, and says what the next step is.

Knows messages and tensors; neither stages nor where messages go.
"""

from __future__ import annotations

import logging

import msgspec
import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.sampling.choosing import Draws, choose_tokens
from lingualinked.model.sampling.processors import build_processors
from lingualinked.protocol.running import BeginRun, EndRun
from lingualinked.protocol.steps import Step
from lingualinked.quantities import count_text
from lingualinked.transport.wire.delivery import Delivery

logger = logging.getLogger("lingualinked.worker")

_MOST_STATE_BYTES = 1 << 16  # of a random number generator
_MOST_EARLY = 1000  # steps without runs, and runs without steps


class TokenRun:
    """One session's run: what it chooses tokens with, and how far it has come."""

    def __init__(self, begin: BeginRun, tensors: tuple[Tensor, ...]) -> None:
        if len(tensors) != bool(begin.processors) + begin.samples:
            raise ProtocolError(
                f"a run begins with {count_text(len(tensors), 'tensor')}, and must have its ids and random state, if any"
            )
        self.model = begin.model
        self.first_name = begin.first_name
        self.number = begin.number  # of the step that is due next
        self.num_left = begin.num_steps
        self._begin = begin
        left = list(tensors)
        rows = len(begin.unfinished)
        self._ids = left.pop(0) if begin.processors else torch.empty(rows, 0, dtype=torch.long)
        if self._ids.ndim != 2 or self._ids.dtype != torch.long or len(self._ids) != rows:
            raise ProtocolError(
                f"a run of {count_text(rows, 'row')} begins with ids {list(self._ids.shape)} of {self._ids.dtype}"
            )
        self._processors = build_processors(begin.processors, begin.rows)
        self._draws = Draws(_read_generator(left.pop()), begin.rows) if begin.samples else None
        self._unfinished = torch.tensor(begin.unfinished, dtype=torch.long)
        self._eos = torch.tensor(begin.eos_token_ids, dtype=torch.long)

    @property
    def has_begun(self) -> bool:
        """Whether its first step has run."""
        return self.number > self._begin.number

    def choose(self, logits: Tensor) -> Tensor | None:
        """Choose the tokens behind a step, int64 ``[rows]``, from its logits, ``[rows, kept tokens, vocabulary]``.

        None if they can't be chosen; the run has ended then.
        """
        self.number += 1
        self.num_left -= 1
        try:
            tokens = choose_tokens(logits[:, -1].cpu(), self._ids, self._processors, self._draws)
        except Exception as error:  # noqa: BLE001 - the caller meets it again, as in the process of an uncut model
            logger.debug("no tokens could be chosen: %s", error)
            return None
        if len(self._eos):
            tokens = tokens * self._unfinished + self._begin.pad_token_id * (1 - self._unfinished)
            self._unfinished = self._unfinished & ~torch.isin(tokens, self._eos)
            if not self._unfinished.any() and self._begin.rows is None:  # other rows of the batch go on
                self.num_left = 0
        if self._begin.processors:
            self._ids = torch.cat([self._ids, tokens[:, None]], dim=-1)
        return tokens

    def next_step(self, step: Step, runner: str, sent_us: int) -> Step:
        """Return the step that follows one that has run, for the first stage."""
        return msgspec.structs.replace(
            step,
            stage=0,
            number=self.number,
            layout=None,
            shape=None,
            mask=self._begin.mask,
            positions=self._begin.positions,
            position_rows=self._begin.position_rows,
            logits_to_keep=1,
            edits=(),
            sent_us=sent_us,
            timings=(),
            instruments=None,
            strides=None,
            extras=None,
            runner=runner,
            run_steps=self.num_left - 1,
        )


class Runs:
    """All runs of one worker, by the session's number, and the first steps that have arrived before their runs have begun."""

    def __init__(self) -> None:
        self._runs: dict[int, TokenRun] = {}
        self._early: dict[int, tuple[Step, Delivery]] = {}

    def begin(self, message: BeginRun, tensors: tuple[Tensor, ...]) -> tuple[Step, Delivery] | None:
        """Begin a run; return its first step if that has arrived already. Raises ProtocolError if its tensors don't fit."""
        early = self._early.pop(message.session, None)
        waiting = [session for session, run in self._runs.items() if not run.has_begun]
        if len(waiting) >= _MOST_EARLY:  # of sessions that have ended before it came, over a quicker link
            del self._runs[waiting[0]]
        self._runs[message.session] = TokenRun(message, tensors)
        return early if early is not None and early[0].number == message.number else None

    def find(self, step: Step) -> TokenRun | None:
        """Return the run that a step belongs to; None if it belongs to none, or to one that is still to begin."""
        run = self._runs.get(step.session) if step.runner else None
        return run if run is not None and (run.model, run.number) == (step.model, step.number) else None

    def keep_early(self, step: Step, delivery: Delivery) -> None:
        """Keep the first step of a run that is still to begin; raise ProtocolError if too many others wait."""
        if len(self._early) >= _MOST_EARLY:
            raise ProtocolError(
                f"{count_text(len(self._early), 'step')} wait for their runs to begin here, and no more may"
            )
        self._early[step.session] = step, delivery

    def end(self, message: EndRun) -> None:
        """Begin no further step of a run; does nothing if it has ended."""
        run = self._runs.get(message.session)
        if run is not None and run.model == message.model and run.number >= message.number:
            run.num_left = 1

    def drop(self, model: int, session: int | None = None) -> None:
        """Forget the run of a session, or of all sessions of a model, and the steps that wait for them."""
        for number in [each for each, run in self._runs.items() if run.model == model and session in (None, each)]:
            del self._runs[number]
        for number in [
            each for each, (step, _) in self._early.items() if step.model == model and session in (None, each)
        ]:
            del self._early[number]


def _read_generator(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    if state.dtype != torch.uint8 or state.ndim != 1 or state.numel() > _MOST_STATE_BYTES:
        raise ProtocolError(f"{state.dtype} {list(state.shape)} is not the state of a random number generator")
    try:
        generator.set_state(state.clone())
    except RuntimeError as error:
        raise ProtocolError(f"the state of a random number generator is not one of this torch: {error}") from error
    return generator

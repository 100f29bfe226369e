"""A packed step on its way through the stages, until its answer has been shared out among its parts.

Knows the sessions of one packed step; neither routes in force nor other steps.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from lingualinked.cluster.messaging.pending import result_of
from lingualinked.cluster.packed.packed_reply import PackedAnswer, PartReply, read_reply
from lingualinked.cluster.packed.packed_session import begin_part, break_session
from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.sessions.session import Session
from lingualinked.cluster.steps.step_reply import StepLabel, StepReply, sample_of
from lingualinked.errors import LingualinkedError
from lingualinked.model.packed.token_choice import TokenChoice
from lingualinked.protocol.packed import PackedStep, PackedText
from lingualinked.telemetry.samples import StepSample


@dataclasses.dataclass(frozen=True, slots=True)
class PackedPart:
    """One session's part in a packed step.

    Parameters
    ----------
    session : Session
        Of one row, without padding.
    ids : sequence of int
        Its new tokens, at least one.
    num_logits : int
        How many of the last ones have logits; 0: none, as in a part of a prompt that is not the last.
    choice : TokenChoice or None
        How the last stage chooses the next token, from the last logits; ``None``: the logits come back.
    """

    session: Session
    ids: Sequence[int]
    num_logits: int = 1
    choice: TokenChoice | None = None


class PackedFlight:
    """A packed step in flight; `PackedSteps.start` makes it, and any thread may wait for it, once."""

    def __init__(self, parts: Sequence[PackedPart]) -> None:
        self.uses = contextlib.ExitStack()  # of its sessions, and of the model as it is
        self._parts = parts
        self._texts: dict[int, PackedText] = {}  # of the parts that are sent, by their places
        self._failed: dict[int, LingualinkedError] = {}  # why the others are not
        self._num_past = 0  # tokens of all sessions before it
        self._route: Route
        self._step: PackedStep
        future: concurrent.futures.Future[tuple[PartReply, ...]] = concurrent.futures.Future()
        self._awaited, self._unsettled = [future], [future]  # no frame that an error passes may name it
        self._began_s = time.monotonic()

    @property
    def future(self) -> concurrent.futures.Future[tuple[PartReply, ...]]:
        """Gives what `result` returns; its callbacks run on the cluster's I/O thread, which must not wait for anything."""
        return self._awaited[0]

    def result(self) -> tuple[PartReply, ...]:
        """Wait for the answer; return what came back of each part, in their order.

        Raises what failed for all of them at once, such as WorkerDiedError; their sessions have ended then.
        """
        return result_of(self._awaited.pop())

    def count_tokens(self) -> tuple[tuple[PackedText, ...], Tensor]:
        """Count the new tokens in the sessions; return the parts to be sent, and their ids, int64 ``[1, tokens]``."""
        ids: list[int] = []
        for place, part in enumerate(self._parts):
            past = part.session.num_tokens
            try:
                self._texts[place] = begin_part(part.session, len(part.ids), part.num_logits, part.choice)
            except LingualinkedError as error:
                self._failed[place] = error.with_traceback(None)
            else:
                self._num_past += past
                ids += part.ids
        return tuple(self._texts.values()), torch.tensor([ids], dtype=torch.long)

    def set_sent(self, step: PackedStep, route: Route) -> None:
        """Record what is sent, and on which route."""
        self._step, self._route = step, route

    def abandon(self, error: BaseException) -> None:
        """End the sessions whose tokens have been counted: what the stages hold of them is not known."""
        for place in self._texts:
            break_session(self._parts[place].session, error)
        self.uses.close()

    def land(
        self,
        answered: concurrent.futures.Future[object] | None,
        vocabulary: int | None,
        watch: Callable[[StepSample], None],
    ) -> None:
        """Share out the answer, let the sessions be used again, and complete the future; ``None``: nothing was sent."""
        replies = {place: PartReply(error=error) for place, error in self._failed.items()}
        try:
            if answered is not None:
                answer = cast("PackedAnswer", answered.result())
                by_session = read_reply(self._step, answer, self._route.stage_devices, vocabulary)
                for place, text in self._texts.items():
                    reply = replies[place] = by_session[text.session]
                    if reply.error is not None:
                        break_session(self._parts[place].session, reply.error)
                watch(self._sample(answer))
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            self.abandon(error)
            self._unsettled.pop().set_exception(error.with_traceback(None))
        else:
            self.uses.close()
            self._unsettled.pop().set_result(tuple(replies[place] for place in range(len(self._parts))))

    def _sample(self, answer: PackedAnswer) -> StepSample:
        """Return what telemetry keeps: texts of one length are rows; of several lengths, one row has all tokens."""
        texts = self._texts.values()
        lengths = {text.num_new for text in texts}
        rows, tokens = (len(texts), lengths.pop()) if len(lengths) == 1 else (1, sum(text.num_new for text in texts))
        sample = sample_of(
            StepLabel(next(iter(texts)).session, self._step.number, self._route.version),
            self._route,
            StepReply((), answer.done.timings, answer.num_bytes),
            self._began_s,
            rows,
            tokens,
            self._num_past // len(texts),
        )
        for place in self._texts:
            self._parts[place].session.last_step = sample
        return sample

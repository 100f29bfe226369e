"""A run of a session: steps that follow each other in the stages, whose tokens the caller takes one after the other.

Knows the messages of one run and what has come of it; neither KV nor what is done with the tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import msgspec
import torch
from torch import Tensor

from lingualinked.cluster.messaging.pending import result_of
from lingualinked.cluster.steps.step_in_flight import StepInFlight
from lingualinked.cluster.steps.step_reply import RunReply, RunStart, sample_of
from lingualinked.errors import ProtocolError, WorkerError
from lingualinked.interrupts import wait_in_pieces
from lingualinked.model.context import ContextCode, PositionMode
from lingualinked.protocol.messages import check
from lingualinked.protocol.running import BeginRun, EndRun
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lingualinked.cluster.messaging.engine import Engine
    from lingualinked.cluster.plans.route import Route
    from lingualinked.cluster.runs.run_request import RunRequest
    from lingualinked.cluster.steps.captured import ExpectedValue
    from lingualinked.cluster.steps.recorded import Recorded
    from lingualinked.cluster.steps.step_in_flight import StepOptions
    from lingualinked.protocol.steps import Step
    from lingualinked.telemetry.samples import StepSample


@dataclasses.dataclass(frozen=True, slots=True)
class TakenTokens:
    """What followed a step of a run: int64 ``[rows]``; or the step's logits ``[rows, kept tokens, vocabulary]`` where none were chosen."""

    tokens: Tensor | None
    logits: Tensor | None


_MOST_IDS = 2**63  # that a tensor can hold


class RunSession(Protocol):
    """The session of a run: see `lingualinked.cluster.sessions.session.Session`."""

    def finish_silent_steps(self, most_tokens: int = 0, until: StepInFlight | None = None) -> None:
        """Finish the chunks of a prompt before the run."""

    def count_steps(self, num_steps: int, positions: PositionMode) -> None:
        """Count the steps that the stages have begun by themselves in a run, which has ended; on the I/O thread."""

    def record_step(self, sample: StepSample, num_new: int) -> None:
        """Count the tokens of a step of a run, and report its timings."""

    def finish_run(self, num_untaken: int, *, can_undo: bool) -> None:
        """Drop the KV of steps of a run whose tokens nobody takes."""

    def break_off(self, error: BaseException, flight: StepInFlight) -> None:
        """End the session after a step that failed."""


class RunInFlight(StepInFlight):
    """A run in the stages; the thread that has started it takes its tokens, and finishes it.

    The arguments are those of a step in flight, the session, how steps after the first one encode mask and positions, and the size of
    the vocabulary if that is known.
    """

    def __init__(
        self,
        step: Step,
        route: Route,
        inputs: Tensor,
        logits_to_keep: int | Tensor,
        num_past: int,
        options: StepOptions,
        due: Mapping[int, ExpectedValue],
        finish: Callable[[StepInFlight], tuple[Tensor, Recorded]],
        session: RunSession,
        later: ContextCode,
        vocabulary: int | None,
    ) -> None:
        super().__init__(step, route, inputs, logits_to_keep, num_past, options, due, finish)
        self.num_begun = 1  # steps; counted on the I/O thread
        self.num_taken = 0
        self.is_finished = False
        self._session = session
        self._later = later
        self._vocabulary = vocabulary
        self._engine: Engine | None = None  # once it has been sent
        self._received: collections.deque[tuple[RunReply, StepSample]] = collections.deque()
        self._has_ended = False
        self._is_ending = False
        self._changed = threading.Condition()

    @property
    def request(self) -> RunRequest:
        """What was asked for."""
        assert self.options.run is not None
        return self.options.run

    def send(
        self,
        engine: Engine,
        tensors: tuple[Tensor, ...],
        timeout_s: float,
        on_failure: Callable[[], None],  # noqa: ARG002 - of hooks
    ) -> None:
        """Begin the run on the last stage, and send its first step to the first one."""
        request, step, devices = self.request, self._step, self._route.stage_devices
        begin = BeginRun(
            model=step.model,
            plan_version=step.plan_version,
            session=step.session,
            number=step.number,
            num_steps=step.run_steps + 1,
            first_name=devices[0],
            processors=request.processors,
            samples=request.random_state is not None,
            rows=request.rows,
            unfinished=request.unfinished,
            eos_token_ids=request.eos_token_ids,
            pad_token_id=request.pad_token_id,
            mask=self._later.mask,
            positions=self._later.positions,
            position_rows=self._later.position_rows,
        )
        state: tuple[Tensor, ...] = (request.input_ids,) if request.processors else ()
        state += () if request.random_state is None else (request.random_state,)
        check(begin)
        answer = engine.step(devices, step, tensors, timeout_s, RunStart(begin, state, self._receive))
        self._answers.append(answer)
        answer.add_done_callback(lambda _: self._notify())
        self._engine = engine
        if self._is_ending:
            self._send_end()

    def await_tokens(self) -> bool:
        """Wait for the tokens behind the next step; return False if the stages have ended the run and all are taken.

        Raises what `Session.step` does.
        """
        self._await(lambda: bool(self._received) or self._has_ended, needs_success=False)
        return bool(self._received)

    @property
    def has_chosen(self) -> bool:
        """Whether the stages have chosen what `await_tokens` has found."""
        return not self._received[0][0].tensors

    def take_tokens(self) -> TakenTokens:
        """Take the tokens that `await_tokens` has found."""
        reply, sample = self._received.popleft()
        self.num_taken += 1
        self._session.record_step(sample, 0 if self.num_taken == 1 else 1)
        if reply.tensors:
            return TakenTokens(None, reply.tensors[0])
        return TakenTokens(torch.tensor(reply.message.tokens), None)

    def end(self) -> None:
        """Let the stages begin no further step; any thread may call it."""
        if not self._has_ended and not self._is_ending:
            self._is_ending = True
            self._send_end()

    def _send_end(self) -> None:
        if self._engine is not None:
            message = EndRun(model=self._step.model, session=self._step.session, number=self._step.number)
            self._engine.send_command(self._route.stage_devices[-1], message)

    def finish(self) -> None:  # type: ignore[override]
        """End the run, and drop what the stages have computed beyond the tokens that were taken."""
        if self.is_finished:
            return
        self.end()
        self._await(lambda: self._has_ended, needs_success=True)
        self.is_finished = True
        self._answers.clear()
        self._session.finish_run(self.num_begun - max(1, self.num_taken), can_undo=self.request.can_undo)

    def _await(self, is_due: Callable[[], bool], *, needs_success: bool) -> None:
        def wait(timeout_s: float) -> bool:
            with self._changed:
                return self._changed.wait_for(is_due, timeout_s)

        try:
            self._session.finish_silent_steps(until=self)
            wait_in_pieces(wait, math.inf)
            if self._answers and self._has_ended and (needs_success or not self._received):
                result_of(self._answers[0])  # raises what it failed with, if it did
        except BaseException as error:
            self.is_finished = True
            self._answers.clear()
            self._session.break_off(error, self)
            raise

    def _notify(self) -> None:
        """Note that the answer is complete, or has failed."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _receive(self, given: object) -> bool:
        """Keep what followed a step, on the I/O thread; return whether another step is under way."""
        reply = cast("RunReply", given)
        number = self._step.number + self.num_begun - 1
        self._check(reply, number)
        now_s = time.monotonic()
        num_past = self._num_past + (self.num_new + self.num_begun - 2 if self.num_begun > 1 else 0)
        num_new = self.num_new if self.num_begun == 1 else 1
        step = msgspec.structs.replace(self._step, number=number)
        # At least as long as its stages say: two messages may be read one right after the other.
        accounted_us = sum(
            each.compute_us + each.codec_us + each.wait_us + (each.hop_us or 0) for each in reply.timings
        )
        ended_s = max(now_s, self._began_s + accounted_us / 1e6)
        sample = sample_of(step, self._route, reply, self._began_s, self.num_rows, num_new, num_past, ended_s)
        self._began_s = now_s
        goes_on = reply.message.goes_on
        if goes_on:
            self.num_begun += 1
        else:
            self._session.count_steps(self.num_begun - 1, self._later.positions)
        with self._changed:
            self._received.append((reply, sample))
            self._changed.notify_all()
        return goes_on

    def _check(self, reply: RunReply, number: int) -> None:
        """Raise a WorkerError of a ProtocolError if a message can't be what followed the step with this number."""
        message, devices = reply.message, self._route.stage_devices
        num_due = self.num_rows if not reply.tensors else 0
        logits = reply.tensors[0] if len(reply.tensors) == 1 else None
        fits = (
            message.number == number
            and len(message.tokens) == num_due
            and len(message.timings) == len(devices)
            and max(message.tokens, default=0) < (self._vocabulary or _MOST_IDS)
            and not (message.goes_on and (reply.tensors or self.num_begun > self._step.run_steps))
            and (not reply.tensors or (logits is not None and self._are_logits(logits)))
        )
        if not fits:
            error = ProtocolError(
                f"tokens behind step {message.number} came, {count_text(len(message.tokens), 'row')} and "
                f"{count_text(len(message.timings), 'stage')}, where step {number} of {count_text(self.num_rows, 'row')} and "
                f"{count_text(len(devices), 'stage')} was due"
            )
            raise WorkerError(devices[-1], f"ProtocolError: {error}") from error

    def _are_logits(self, tensor: Tensor) -> bool:
        return (
            tensor.is_floating_point()
            and tensor.itemsize > 1
            and tensor.ndim == 3
            and len(tensor) == self.num_rows
            and tensor.shape[1] > 0
            and self._vocabulary in (None, tensor.shape[2])
        )

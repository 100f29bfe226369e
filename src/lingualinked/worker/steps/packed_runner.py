"""Runs packed steps on the stages of a worker, and sends their results on.

Knows messages, stages and where results go; not who may send what.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence

import msgspec
from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.model.packed.choosing import ChosenTokens, choose_tokens
from lingualinked.model.packed.token_choice import TokenChoice
from lingualinked.model.tensor_strides import pack_tensor, unpack_tensor
from lingualinked.protocol.messages import encode
from lingualinked.protocol.packed import PackedDone, PackedFailed, PackedFailure, PackedStep
from lingualinked.protocol.steps import StageTimes
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.transport.wire.hop_clock import HopClock, clock_us
from lingualinked.worker.messaging.error_report import ErrorReport, describe_error
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps.failed_steps import run_or_report
from lingualinked.worker.steps.pace import Pace
from lingualinked.worker.steps.packed_texts import PackedTexts, check_packed

_MOST_EARLY = 1000


class PackedRunner:
    """Runs one packed step after another; one whose sessions have not all moved here yet waits, and those behind it of the same."""

    def __init__(self, mailbox: Mailbox, peers: Peers, stages: HostedStages, pace: Pace, accelerator: str) -> None:
        self._mailbox = mailbox
        self._peers = peers
        self._stages = stages
        self._pace = pace
        self._accelerator = accelerator
        self._hops = HopClock()
        self._early: list[tuple[PackedStep, Delivery]] = []

    def receive_step(self, step: PackedStep, delivery: Delivery) -> None:
        """Run a packed step once it can run; raise ProtocolError if it is malformed."""
        check_packed(step, delivery.tensors)
        if len(self._early) >= _MOST_EARLY:
            raise ProtocolError("too many packed steps wait for their sessions to move here")
        self._early.append((step, delivery))
        self.run_due()

    def run_due(self) -> None:
        """Run the packed steps that can run now, in order; a session has moved, or a step has arrived."""
        waiting, self._early = self._early, []
        held_up: set[tuple[int, int]] = set()  # sessions of steps that still wait
        for step, delivery in waiting:
            sessions = {(step.model, text.session) for text in step.texts}
            if held_up.isdisjoint(sessions) and self._is_due(step):
                self._serve(step, delivery)
            else:
                held_up |= sessions
                self._early.append((step, delivery))

    def drop_model(self, model: int) -> None:
        """Report the packed steps of a model that wait for their sessions: it moves on, or is unloaded."""
        dropped = [step for step, _ in self._early if step.model == model]
        self._early = [each for each in self._early if each[0].model != model]
        for step in dropped:
            sessions = ", ".join(str(text.session) for text in step.texts[:9])
            error = ProtocolError(
                f"a packed step arrived of sessions {sessions}, one of which has not moved to the step's plan version"
            )
            self._report_failure(step, describe_error(error))

    def _is_due(self, step: PackedStep) -> bool:
        key = StageKey(step.model, step.plan_version, step.stage)
        due = True
        for text in step.texts:
            with contextlib.suppress(ProtocolError):  # this text will fail
                due &= self._stages.is_due(key, text.session, text.number)
        return due

    def _serve(self, step: PackedStep, delivery: Delivery) -> None:
        run = functools.partial(self._run, step, delivery)
        run_or_report(run, functools.partial(self._report_failure, step), self._stages, self._accelerator)

    def _report_failure(self, step: PackedStep, failure: ErrorReport) -> None:
        failed = PackedFailed(model=step.model, number=step.number, **failure)
        self._mailbox.send(CALLER, encode(failed))

    def _run(self, step: PackedStep, delivery: Delivery) -> None:
        # 1) how long the step travelled and waited
        hop_us, wait_us = self._hops.split_delay(
            delivery.sender, step.sent_us, delivery.due_s, delivery.decode_s, same_host=delivery.same_host
        )
        # 2) run the texts that can run
        hosted = self._stages.get_stage(StageKey(step.model, step.plan_version, step.stage))
        if any(text.number == 0 for text in step.texts):
            self._stages.trim_idle_caches()
        started = self._pace.start_timer()
        packed = PackedTexts(hosted, step)
        output, layout = None, step.layout
        if packed.texts:
            output, layout = packed.run(unpack_tensor(delivery.tensors[0], step.strides))
        step = msgspec.structs.replace(
            step, texts=tuple(packed.texts), failures=(*step.failures, *packed.failures), layout=layout
        )
        done, kept = _choose(hosted, step, output, packed.lengths) if hosted.stage.is_last else (None, None)
        elapsed_s = self._pace.finish_timer(started)
        hosted.record_step(elapsed_s)
        # 3) add this stage's times to the step's header
        times = StageTimes(
            received_bytes=delivery.num_bytes,
            hop_us=hop_us,
            wait_us=wait_us,
            compute_us=round(elapsed_s * 1e6),
            codec_us=round((delivery.decode_s + self._mailbox.encode_s) * 1e6),
        )
        timings = (*step.timings, times)
        # 4) send the caller what was chosen, and logits, or the next stage hidden states
        if done is not None:
            done = msgspec.structs.replace(done, timings=timings)
            hosted.sent_bytes += self._mailbox.send(CALLER, encode(done), () if kept is None else (kept,))
        else:
            self._send_onward(hosted, step, timings, output)

    def _send_onward(
        self, hosted: HostedStage, step: PackedStep, timings: tuple[StageTimes, ...], output: Tensor | None
    ) -> None:
        states, strides = (None, None) if output is None else pack_tensor(output)
        onward = msgspec.structs.replace(
            step, stage=step.stage + 1, strides=strides, timings=timings, sent_us=clock_us()
        )
        hosted.sent_bytes += self._peers.send(hosted.next_name, onward, () if states is None else (states,))


def _choose(
    hosted: HostedStage, step: PackedStep, output: Tensor | None, lengths: Sequence[int]
) -> tuple[PackedDone, Tensor | None]:
    """Choose the tokens of the texts that have a choice; return the answer, and the logits that belong to it.

    A text of which no token can be chosen fails, and ends here. `lengths` are the numbers of tokens of the texts.
    """
    # 1) find the logits of each text
    rows = None if output is None else output[0]
    ends = list(itertools.accumulate(text.num_logits for text in step.texts))
    choosing = [place for place, text in enumerate(step.texts) if text.choice is not None]
    # 2) choose
    chosen = ChosenTokens((), (), {})
    if rows is not None and choosing:
        choices = [step.texts[place].choice or TokenChoice() for place in choosing]
        chosen = choose_tokens(
            rows[[ends[place] - 1 for place in choosing]], choices, [lengths[place] for place in choosing]
        )
    failed = {choosing[index]: error for index, error in chosen.failed.items()}
    failures = [
        PackedFailure(session=step.texts[place].session, stage=step.stage, **describe_error(error))
        for place, error in failed.items()
    ]
    for failure in failures:
        hosted.end_session(failure.session)
    # 3) answer for the others
    left = [(text, end) for place, (text, end) in enumerate(zip(step.texts, ends, strict=True)) if place not in failed]
    done = PackedDone(
        model=step.model,
        number=step.number,
        sessions=tuple(text.session for text, _ in left),
        failures=(*step.failures, *failures),
        tokens=chosen.tokens,
        logprobs=chosen.logprobs,
        timings=(),
    )
    returned = [
        row
        for text, end in left
        if text.choice is None or text.choice.returns_logits
        for row in range(end - text.num_logits, end)
    ]
    if rows is None or not returned:
        return done, None
    return done, rows if len(returned) == len(rows) else rows[returned]

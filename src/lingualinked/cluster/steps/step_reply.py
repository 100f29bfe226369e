"""The last stage's answer to a step: whether it can be one, and what it tells of the step.

Knows shapes and numbers; neither messages' ways nor sessions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lingualinked.cluster.plans.route import Route
from lingualinked.errors import ProtocolError, WorkerError
from lingualinked.protocol.hooking import HookReached
from lingualinked.protocol.running import BeginRun, TokensChosen
from lingualinked.protocol.steps import StageTimes, Step, StepDone
from lingualinked.quantities import count_text
from lingualinked.telemetry.samples import StageTiming, StepSample
from lingualinked.transport.wire.delivery import Delivery


@dataclasses.dataclass(frozen=True, slots=True)
class StepReply:
    """The last stage's answer to a step: the logits, what each stage tells of the step, and the bytes of the answer."""

    tensors: tuple[Tensor, ...]
    timings: tuple[StageTimes, ...]
    num_bytes: int
    parts: Mapping[int, object] = dataclasses.field(default_factory=dict)  # what stages recorded, by stage
    requires_grad: bool = False  # whether the logits have a gradient
    ends_at_tap: tuple[bool, ...] = ()  # of the other stages: whether their output is what hooks have returned

    @classmethod
    def of(cls, message: StepDone, delivery: Delivery, parts: Mapping[int, object]) -> StepReply:
        """Return the answer that a message is, with what stages have recorded."""
        outcome = message.requires_grad, message.ends_at_tap
        return cls(delivery.tensors, message.timings, delivery.num_bytes, parts, *outcome)


@dataclasses.dataclass(frozen=True, slots=True)
class RunStart:
    """What the last stage is sent of a run, and what is called on the I/O thread with each `RunReply`: whether more are due."""

    begin: BeginRun
    state: tuple[Tensor, ...]
    on_tokens: Callable[[object], bool]


@dataclasses.dataclass(frozen=True, slots=True)
class RunReply:
    """What the last stage says of a step of a run, the logits if it has chosen no tokens, and the bytes of the message."""

    message: TokensChosen
    tensors: tuple[Tensor, ...]
    num_bytes: int

    @property
    def timings(self) -> tuple[StageTimes, ...]:
        """What each stage tells of the step."""
        return self.message.timings


@dataclasses.dataclass(frozen=True, slots=True)
class HookEvent:
    """A step waits for the hooks of a module: what it was called with, on which device, and the tensors of that."""

    message: HookReached
    device: str
    tensors: tuple[Tensor, ...]


def check_reply(
    reply: StepReply,
    devices: tuple[str, ...],
    inputs: Tensor,
    logits_to_keep: int | Tensor,
    vocabulary: int | None,
    *,
    wants_logits: bool = True,
) -> Tensor:
    """Return the logits of an answer, or raise a WorkerError of a ProtocolError if it is not what was asked for.

    ``vocabulary`` is how many logits each token has, if that is known. Of a step that wants no logits, they are of no tokens.
    """
    shape = _kept_shape(inputs.shape[0], inputs.shape[1], logits_to_keep)
    logits = reply.tensors[0] if len(reply.tensors) == 1 else torch.empty(0)
    fits = logits.is_floating_point() and logits.itemsize > 1 and tuple(logits.shape[:-1]) == shape
    if not wants_logits:
        logits, fits = torch.empty(inputs.shape[0], 0, vocabulary or 0), not reply.tensors
    if fits and vocabulary in (None, logits.shape[-1]) and len(reply.timings) == len(devices):
        return logits
    came = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in reply.tensors) or "none"
    due = f"logits {[*shape, vocabulary or 'vocabulary']}" if wants_logits else "no logits"
    error = ProtocolError(
        f"the answer to a step came with the tensors {came} and the times of {count_text(len(reply.timings), 'stage')}, where "
        f"{due} and the times of {len(devices)} were due"
    )
    raise WorkerError(devices[-1], f"ProtocolError: {error}") from error


class StepLabel(NamedTuple):
    """What a step is known by in telemetry."""

    session: int
    number: int
    plan_version: int


def sample_of(
    step: Step | StepLabel,
    route: Route,
    reply: StepReply | RunReply,
    began_s: float,
    rows: int,
    tokens: int,
    context: int,
    ended_s: float | None = None,
) -> StepSample:
    """Return what is kept of a step that began at a time and ended at another, or now, over so many rows and tokens behind others."""
    total_s = (time.monotonic() if ended_s is None else ended_s) - began_s
    sent_bytes = [*(each.received_bytes for each in reply.timings[1:]), reply.num_bytes]
    return StepSample(
        time_s=began_s,
        session=step.session,
        number=step.number,
        plan_version=step.plan_version,
        rows=rows,
        tokens=tokens,
        context=context,
        total_s=total_s,
        stages=tuple(
            StageTiming(
                device=stage.device,
                start=stage.start,
                end=stage.end,
                hop_s=hop_s,
                wait_s=wait_s,
                compute_s=times.compute_us / 1e6,
                codec_s=times.codec_us / 1e6,
                sent_bytes=num_bytes,
            )
            for stage, times, num_bytes, (hop_s, wait_s) in zip(
                route.plan.stages, reply.timings, sent_bytes, _delays(reply.timings, total_s), strict=True
            )
        ),
    )


def _delays(timings: Sequence[StageTimes], total_s: float) -> list[tuple[float, float]]:
    """Return the seconds that a step of this length travelled to each stage, and waited there.

    Clocks of two hosts are not compared. What no stage accounts for is the travel between hosts and back to the caller, in
    equal parts. A clock that was set anew, as after a sleep, makes no stage wait longer than the step took.
    """
    left_s = total_s - sum(each.compute_us + each.codec_us + (each.hop_us or 0) for each in timings) / 1e6
    waits_s = []
    for each in timings:
        wait_s = each.wait_us / 1e6
        if each.hop_us is None:
            wait_s = max(0.0, min(wait_s, left_s))
        left_s -= wait_s
        waits_s.append(wait_s)
    share_s = max(0.0, left_s) / (1 + sum(each.hop_us is None for each in timings))
    return [
        (share_s if each.hop_us is None else each.hop_us / 1e6, wait_s)
        for each, wait_s in zip(timings, waits_s, strict=True)
    ]


def _kept_shape(num_rows: int, num_new: int, logits_to_keep: int | Tensor) -> tuple[int, ...]:
    """Return the shape of what is kept, less the vocabulary, as transformers reads ``logits_to_keep``."""
    if isinstance(logits_to_keep, int):
        return num_rows, len(range(num_new)[-logits_to_keep:])
    if logits_to_keep.ndim != 2:
        return num_rows, *torch.empty(num_new)[logits_to_keep].shape
    is_mask = logits_to_keep.dtype == torch.bool
    return (int(logits_to_keep.sum()),) if is_mask else (num_rows, logits_to_keep.shape[1])

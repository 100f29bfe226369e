"""The messages of a packed step: new tokens of several sessions in one pass through the stages.

Knows what a packed step consists of; its tensors travel beside the messages.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from lingualinked.model.adapters.adapter_data import AdapterUse
from lingualinked.model.hooks.hook_data import Strides
from lingualinked.model.packed.token_choice import TokenChoice
from lingualinked.model.stages.layer_skips import LayerSkips
from lingualinked.protocol.base import Message, Natural, Positive
from lingualinked.protocol.failures import FailureKind
from lingualinked.protocol.steps import KVEdit, StageTimes


class PackedText(Message, frozen=True):
    """One session's part in a packed step, which is its step ``number``.

    Of its ``num_new`` tokens, the last ``num_logits`` have logits. With a ``choice``, the last stage chooses the next token.
    ``max_cache_len`` is that of `Step`.
    """

    session: int
    number: Natural
    num_new: Positive
    num_logits: Natural
    edits: tuple[KVEdit, ...] = ()
    max_cache_len: Natural = 0
    choice: TokenChoice | None = None


class PackedFailure(Message, frozen=True):
    """Why a session had no further part in a packed step from stage ``stage`` on; its KV there is freed."""

    session: int
    stage: Natural
    kind: FailureKind
    cause: str
    traceback: str


class PackedStep(Message, frozen=True, tag=84):
    """Run one step of each of several sessions on stage ``stage``, in one forward pass.

    Its tensor holds the tokens of all texts in order: token ids, int64 ``[1, tokens]``, on the first stage, and the output of the
    previous stage's last layer on others. Each text has one row, no padding and consecutive positions. A text that fails is
    left out by the stages that follow, and listed in ``failures``. ``number`` is the packed step's own, among those of all models.
    No layer sees fewer than ``least_rows`` tokens: the last one is repeated. One that ``is_invariant`` has bits that
    do not depend on the number of threads. The other fields are those of `Step`.
    """

    model: int
    plan_version: int
    stage: int
    number: int
    texts: tuple[PackedText, ...]
    failures: tuple[PackedFailure, ...]
    layout: tuple[bool, ...] | None
    sent_us: int
    timings: tuple[StageTimes, ...]
    least_rows: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    torch_settings: tuple[tuple[str, bool | int | str], ...] = ()
    adapters: AdapterUse | None = None
    skips: LayerSkips | None = None
    strides: Strides = None
    is_invariant: bool = False


class PackedDone(Message, frozen=True, tag=85):
    """The last stage's answer to a packed step.

    ``sessions`` are those that have run in all stages. Each one with a choice has its next token in ``tokens``, in order, and the
    logarithm of its probability in ``logprobs``, if the choice returns that. The logits of the others, and of those whose choice
    returns them, are in the tensor beside the message, ``[logits, vocabulary]``, in order; without any, there is no tensor.
    """

    model: int
    number: int
    sessions: tuple[int, ...]
    failures: tuple[PackedFailure, ...]
    tokens: tuple[Natural, ...]
    logprobs: tuple[float, ...]
    timings: tuple[StageTimes, ...]


class PackedFailed(Message, frozen=True, tag=86):
    """A packed step failed as a whole; the KV of its sessions is freed on the stage where it did."""

    model: int
    number: int
    kind: FailureKind
    cause: str
    traceback: str

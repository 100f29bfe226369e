"""The messages of a step on its way through the stages, and what comes back of it.

Knows what a step consists of; its tensors travel beside the messages.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from lingualinked.errors import ProtocolError
from lingualinked.model.adapters.adapter_data import AdapterUse
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.hooks.hook_data import HookPoint, Strides
from lingualinked.model.hooks.instrument_data import Instruments
from lingualinked.model.stages.layer_skips import LayerSkips
from lingualinked.protocol.base import Message, Natural


class KVEditKind(enum.IntEnum):
    """An edit of a session's KV cache, made before the next step runs."""

    REORDER = 1
    CROP = 2
    RECORD = 3
    RESERVE = 4


class KVEdit(Message, frozen=True):
    """One edit of a session's KV.

    ``values`` are, by kind: the row indices to keep; the number of tokens to remove at the end; whether tokens that leave
    a sliding window must stay recoverable; or the tokens per row that are expected in total.
    """

    kind: KVEditKind
    values: tuple[int, ...]


class StageTimes(Message, frozen=True):
    """One stage's measurements of a step: bytes received, and microseconds (see `lingualinked.telemetry.samples`)."""

    received_bytes: Natural
    hop_us: Natural | None  # None: from another host, whose clock is not this one
    wait_us: Natural
    compute_us: Natural
    codec_us: Natural


RECORDS = frozenset({"hidden_states", "attentions", "router_logits"})
"""What layers may record in a step, by the names of transformers' outputs."""


class ExtraTensors(Message, frozen=True):
    """Further arguments of the model's forward that come with a step, by name, in the order of their tensors.

    The last ``num_for_first`` are for the first stage alone, which does not send them on. Pictures among them are encoded by the
    forward, or before it, for ``picture_copies`` rows in sequence that have the same ones, if that is not 0.
    """

    names: tuple[str, ...]
    num_for_first: Natural
    picture_copies: Natural = 0

    def __post_init__(self) -> None:
        if self.num_for_first > len(self.names):
            raise ProtocolError(f"{self.num_for_first} of {len(self.names)} further tensors are for the first stage")
        if len(set(self.names)) < len(self.names):
            raise ProtocolError(f"further tensors {self.names!r} of a step must have different names")


class Step(Message, frozen=True, tag=4):
    """Run one step of a session on stage ``stage``.

    Its tensors are, in order: the stage's inputs (token ids or embeddings on the first stage, the raw output of the
    previous stage's last layer on others), the mask if `MaskMode.FULL`, the positions if `PositionMode.FULL`, the
    indices of the logits to keep if ``logits_to_keep`` is ``None``, those of ``instruments``, and ``extras``. Unless it ``wants_logits``, the
    last stage computes none, and sends none to the caller.

    ``rope_reach`` is how far the model's rotary embeddings are stretched before the step; 0 if they are never stretched.
    ``torch_settings`` are the caller's settings that differ from torch's defaults, such as autocast: stages compute under
    them. Stages send what of ``records`` their layers give (`RECORDS`) to the caller (`StepRecorded`);
    of hidden states only those with the indices ``hidden_state_indices``, if it is not None.
    At each of ``hooks`` the stage stops and sends `HookReached` to the caller.
    ``instruments`` replace those that the session has, from this step on; None: they stay. ``captures`` tells whether some
    of them capture something in this step, which every stage then sends to the caller (`StepRecorded`).
    If ``requires_grad`` is not None, each stage keeps the autograd graph of the step until `FreeGraph`, or its own end; it
    says of which of the stage's inputs gradients may be asked for. Each stage then adds to ``ends_at_tap`` whether its output is
    what the hooks that ran last in it have returned.
    Stages compute with the adapters that ``adapters`` says, of those that they have (`AddAdapter`); None: without any.
    They run no layers that ``skips`` names. ``strides`` are those of the stage's input if it is sent in another order.
    ``shape`` says rows and tokens where the stage's input does not show them.
    In a run, the worker ``runner`` of the last stage may send the session's next ``run_steps`` steps to the first one (`BeginRun`).
    The session's first step says how many tokens per row its KV cache holds from the start, ``max_cache_len``; 0: it grows.
    Each stage adds one element to ``timings``. ``sent_us`` is the sender's clock modulo 2^32 microseconds; only
    differences are meaningful.
    """

    model: int
    plan_version: int
    stage: int
    session: int
    number: int
    keeps_kv: bool
    layout: tuple[bool, ...] | None
    mask: MaskMode
    positions: PositionMode
    position_rows: int
    logits_to_keep: int | None
    edits: tuple[KVEdit, ...]
    rope_reach: int
    sent_us: int
    timings: tuple[StageTimes, ...]
    torch_settings: tuple[tuple[str, bool | int | str], ...] = ()
    records: tuple[str, ...] = ()
    hidden_state_indices: tuple[int, ...] | None = None
    max_cache_len: Natural = 0
    hooks: tuple[HookPoint, ...] = ()
    instruments: Instruments | None = None
    captures: bool = False
    requires_grad: tuple[bool, ...] | None = None
    ends_at_tap: tuple[bool, ...] = ()
    adapters: AdapterUse | None = None
    skips: LayerSkips | None = None
    strides: Strides = None
    wants_logits: bool = True
    runner: str = ""
    run_steps: Natural = 0
    extras: ExtraTensors | None = None
    shape: tuple[Natural, Natural] | None = None

    def __post_init__(self) -> None:
        # What a user may set. Steps are too many to be checked as a whole, as requests are (`check`).
        if self.logits_to_keep is not None and not isinstance(self.logits_to_keep, int):
            raise ProtocolError(f"logits_to_keep={self.logits_to_keep!r} must be an int or None")
        if not RECORDS.issuperset(self.records):
            raise ProtocolError(f"records={self.records!r} must be some of {sorted(RECORDS)}")


MOST_TOGETHER = 256
"""Steps of one message; no stage runs as many in one pass."""


class StepGroup(Message, frozen=True, tag=38):
    """Steps of several sessions, of one row and one token each, that go the same way at the same time.

    Its tensor holds their inputs in order: token ids, int64 ``[steps, 1]``, or hidden states, ``[steps, 1, hidden]``. Each step is
    received as if it had come by itself.
    """

    steps: Annotated[tuple[Step, ...], msgspec.Meta(min_length=1, max_length=MOST_TOGETHER)]


class ShortcutTensors(Message, frozen=True, tag=87):
    """What stage ``source`` has made in a step for the later stage ``stage``, sent straight there.

    Its tensors are the shortcuts ``names``, in order (`lingualinked.transmission`). The later stage runs the step once each of
    its sources has sent this message, even if some had nothing to send.
    """

    model: int
    plan_version: int
    stage: int
    source: Natural
    session: int
    number: int
    names: tuple[str, ...]


class EndSession(Message, frozen=True, tag=5):
    """Free a session's KV on stage ``stage`` and forward this message; it is sent after the session's last step."""

    model: int
    plan_version: int
    stage: int
    session: int


class StepDone(Message, frozen=True, tag=21):
    """The last stage's answer to a step, sent with its logits, and whether these have a gradient (``requires_grad``).

    ``ends_at_tap`` is that of the step.
    """

    model: int
    session: int
    number: int
    timings: tuple[StageTimes, ...]
    requires_grad: bool = False
    ends_at_tap: tuple[bool, ...] = ()


class StepRecorded(Message, frozen=True, tag=35):
    """What a stage recorded in a step, sent as soon as the stage has sent the step on.

    ``layouts`` say for each of the step's ``records`` which of its items are tensors, in order, and not None. The tensors
    behind them were captured by the session's instruments with the numbers ``captured``: one for each, or one with a
    first dimension for all (``is_stacked``).
    """

    model: int
    session: int
    number: int
    stage: int
    layouts: tuple[tuple[bool, ...], ...]
    captured: tuple[Natural, ...] = ()
    is_stacked: bool = False

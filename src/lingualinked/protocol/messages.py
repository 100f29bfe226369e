"""The messages between caller and workers, as msgspec structs, and their codec.

Knows neither who sends them nor over what. Tensors are sent with a message, never in it.
"""

from __future__ import annotations

import enum

import msgspec

from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.hook_data import HookPoint
from lingualinked.model.spec import ModelSpec
from lingualinked.protocol.base import Message, Natural
from lingualinked.protocol.boot import Emulation
from lingualinked.protocol.hooking import HookAnswered, HookReached
from lingualinked.protocol.measuring import LinkProbed, MeasureModel, ModelMeasured, Ping, Pong, ProbeLink
from lingualinked.protocol.moving import (
    AnnounceMove,
    CopyKV,
    FetchWeight,
    ForkSession,
    KeepPlan,
    KVChunk,
    KVCopied,
    KVReceived,
    MoveSession,
    WeightChunk,
)
from lingualinked.protocol.reading import ReadTensor, TensorRead
from lingualinked.rounding import Rounding
from lingualinked.telemetry.reports import StageSnapshot, WorkerSnapshot
from lingualinked.telemetry.samples import DeviceSample

# --- from the caller, about a worker and its stages


class WeightHolder(Message, frozen=True):
    """A worker that holds layers ``[start, end)`` of a model, as a stage of the current plan, and whether it lends them."""

    name: str
    model: int
    plan_version: int
    stage: int
    start: int
    end: int
    lends: bool


class LoadStage(Message, frozen=True, tag=1):
    """Load layers ``[start, end)`` of a model as stage ``stage`` of a plan, between two parties.

    The stage accepts steps only from ``previous_name`` and sends its outputs to ``next_name``. All sessions together may
    hold ``max_kv_tokens`` rows x tokens of KV. The stage shares layers that stages of other versions hold on this worker.
    If the checkpoint's files can't be read here, or have changed, the other weights are fetched from their ``holders``;
    without holders, loading fails.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    spec: ModelSpec
    start: int
    end: int
    previous_name: str
    next_name: str
    max_kv_tokens: int | None
    holders: tuple[WeightHolder, ...]


class UnloadModel(Message, frozen=True, tag=2):
    """Free every stage of a model, with its sessions; there is no answer."""

    model: int


class InspectWorker(Message, frozen=True, tag=3):
    """Ask for a `WorkerReport`."""

    request: int


class EmulateDevice(Message, frozen=True, tag=6):
    """Emulate another device from now on."""

    request: int
    emulation: Emulation


class IntroduceWorker(Message, frozen=True, tag=29):
    """Accept messages from another worker, which holds this key, and send its messages to this address."""

    request: int
    name: str
    public_key: str
    address: str


class DismissWorker(Message, frozen=True, tag=33):
    """Remove a worker that has ended; another one may be introduced under its name."""

    name: str


# --- along the pipeline


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
    hop_us: Natural
    wait_us: Natural
    compute_us: Natural
    codec_us: Natural


RECORDS = frozenset({"hidden_states", "attentions", "router_logits"})
"""What layers may record in a step, by the names of transformers' outputs."""


class Step(Message, frozen=True, tag=4):
    """Run one step of a session on stage ``stage``.

    Its tensors are, in order: the stage's inputs (token ids or embeddings on the first stage, the raw output of the
    previous stage's last layer on others), the mask if `MaskMode.FULL`, the positions if `PositionMode.FULL`, and the
    indices of the logits to keep if ``logits_to_keep`` is ``None``.

    ``rope_reach`` is how far the model's rotary embeddings are stretched before the step; 0 if they are never stretched.
    ``torch_settings`` are the caller's settings that differ from torch's defaults, such as autocast: stages compute under
    them. Stages send what of ``records`` their layers give (`RECORDS`) to the caller (`StepRecorded`);
    of hidden states only those with the indices ``hidden_state_indices``, if it is not None.
    At each of ``hooks`` the stage stops and sends `HookReached` to the caller.
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

    def __post_init__(self) -> None:
        # What a user may set. Steps are too many to be checked as a whole, as requests are (`check`).
        if self.logits_to_keep is not None and not isinstance(self.logits_to_keep, int):
            raise ProtocolError(f"logits_to_keep={self.logits_to_keep!r} must be an int or None")
        if not RECORDS.issuperset(self.records):
            raise ProtocolError(f"records={self.records!r} must be some of {sorted(RECORDS)}")


class EndSession(Message, frozen=True, tag=5):
    """Free a session's KV on stage ``stage`` and forward this message; it is sent after the session's last step."""

    model: int
    plan_version: int
    stage: int
    session: int


# --- to the caller


class Hello(Message, frozen=True, tag=16):
    """A worker is ready, and its inbox listens at this address."""

    pid: int
    address: str


class Progress(Message, frozen=True, tag=17):
    """The progress of a request: bytes of a stage loaded, or shapes of steps measured."""

    request: int
    num_done: int


class StageLoaded(Message, frozen=True, tag=18):
    """Answer to `LoadStage`: the stage is in service."""

    request: int
    weight_bytes: int
    num_bytes_read: int
    rounding: Rounding


class Acknowledged(Message, frozen=True, tag=25):
    """Answer to `EmulateDevice`, `IntroduceWorker`, `AnnounceMove` and `ForkSession`: done."""

    request: int


class StageReport(Message, frozen=True):
    """One hosted stage, of a model under a plan version."""

    model: int
    plan_version: int
    snapshot: StageSnapshot


class WorkerReport(Message, frozen=True, tag=20):
    """Answer to `InspectWorker`; the caller, which knows whom it asked and when, fills in the device's name and the time."""

    request: int
    worker: WorkerSnapshot
    device: DeviceSample
    stages: tuple[StageReport, ...]


class StepDone(Message, frozen=True, tag=21):
    """The last stage's answer to a step, sent with its logits."""

    model: int
    session: int
    number: int
    timings: tuple[StageTimes, ...]


class StepRecorded(Message, frozen=True, tag=35):
    """What a stage recorded in a step, sent before the stage sends the step on.

    ``layouts`` say for each of the step's ``records`` which of its items are tensors, in order, and not None.
    """

    model: int
    session: int
    number: int
    stage: int
    layouts: tuple[tuple[bool, ...], ...]


class FailureKind(enum.IntEnum):
    """The kind of error that a worker's failure becomes in the caller."""

    ERROR = 0
    MEMORY = 1
    CHECKPOINT = 2
    ARGUMENT = 3


class RequestFailed(Message, frozen=True, tag=22):
    """A request failed."""

    request: int
    kind: FailureKind
    cause: str
    traceback: str


class KVRefused(Message, frozen=True, tag=30):
    """Answer to `CopyKV`, from the target: it could not use the KV that it received."""

    request: int
    model: int
    kind: FailureKind
    cause: str
    traceback: str


class StepFailed(Message, frozen=True, tag=23):
    """A stage raised an exception in a step; the session can't continue."""

    model: int
    session: int
    number: int
    kind: FailureKind
    cause: str
    traceback: str


class LogRecord(Message, frozen=True, tag=24):
    """A log record of a worker."""

    level: int
    logger: str
    text: str


PeerMessage = Step | EndSession | Ping | Pong | KVChunk | KVReceived | FetchWeight | WeightChunk
"""The messages between workers."""

CallerMessage = (
    LoadStage
    | UnloadModel
    | InspectWorker
    | EmulateDevice
    | IntroduceWorker
    | DismissWorker
    | MeasureModel
    | ProbeLink
    | AnnounceMove
    | KeepPlan
    | CopyKV
    | MoveSession
    | ForkSession
    | ReadTensor
    | Ping
    | Pong
    | Step
    | HookAnswered
    | EndSession
)
Request = (
    LoadStage
    | InspectWorker
    | EmulateDevice
    | MeasureModel
    | ProbeLink
    | AnnounceMove
    | CopyKV
    | ForkSession
    | ReadTensor
)
WorkerMessage = (
    Hello
    | Progress
    | StageLoaded
    | KVCopied
    | KVRefused
    | Acknowledged
    | ModelMeasured
    | LinkProbed
    | Ping
    | Pong
    | WorkerReport
    | TensorRead
    | StepDone
    | StepRecorded
    | HookReached
    | RequestFailed
    | StepFailed
    | LogRecord
)
AnyMessage = CallerMessage | PeerMessage | WorkerMessage

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Encode a message."""
    return _encoder.encode(message)


def check(message: AnyMessage) -> None:
    """Refuse a message that its receiver would not understand, where it is made: raise ProtocolError."""
    decode(encode(message))


def decode(payload: bytes) -> AnyMessage:
    """Decode a message, or raise ProtocolError if it is not a known one, or a field has the wrong type."""
    try:
        return _decoder.decode(payload)
    except Exception as error:  # msgspec also raises errors of text decoding and of deep nesting
        raise ProtocolError(f"the payload is not a message of this protocol: {error}") from error

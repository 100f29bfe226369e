"""The messages that cross a socket, as msgspec structs, and the one codec for them.

Knows neither who sends them nor over what; tensors travel beside a message, never in it.
"""

from __future__ import annotations

import enum

import msgspec

from lingualinked.errors import ProtocolError
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.spec import ModelSpec
from lingualinked.protocol.boot import Emulation
from lingualinked.protocol.message import Message, Natural
from lingualinked.protocol.moving import (
    AnnounceMove,
    CopyKV,
    FetchWeight,
    ForkSession,
    KeepPlan,
    KVChunk,
    KVCopied,
    KVTaken,
    MoveSession,
    WeightChunk,
)

# --- from the caller: about the worker and its stages


class Holder(Message, frozen=True):
    """A worker that holds layers ``[start, end)`` of a model, as a stage of the plan in force; whether it lends them here."""

    name: str
    model: int
    plan_version: int
    stage: int
    start: int
    end: int
    lends: bool


class LoadStage(Message, frozen=True, tag=1):
    """Load layers ``[start, end)`` of a model as stage ``stage`` of a plan, between two parties.

    Steps are taken from ``previous_name`` alone, and outputs go to ``next_name``. All sessions together may hold
    ``max_kv_tokens`` rows x tokens of KV. Layers that stages of other versions hold here are shared with them. Where the
    checkpoint's files can't be read here, or are not those of the spec any more, the weights of the rest are fetched from
    their holders; without such, that fails.
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
    holders: tuple[Holder, ...]


class UnloadModel(Message, frozen=True, tag=2):
    """Free every stage of a model, its sessions included; nothing is answered."""

    model: int


class Inspect(Message, frozen=True, tag=3):
    """Ask for a `WorkerReport`."""

    request: int


class Emulate(Message, frozen=True, tag=6):
    """Behave as another device from now on."""

    request: int
    emulation: Emulation


class Introduce(Message, frozen=True, tag=29):
    """Take messages from the holder of this key, another worker, and send to this address what is meant for it."""

    request: int
    name: str
    public_key: str
    address: str


class Dismiss(Message, frozen=True, tag=33):
    """Forget a worker that has been introduced and is gone: another one may be introduced by its name."""

    name: str


class StepShape(Message, frozen=True):
    """Rows of the batch, new tokens of each, and tokens of each that are in the KV cache already."""

    rows: int
    tokens: int
    context: int


class MeasureModel(Message, frozen=True, tag=7):
    """Measure what the parts of a model cost: run spans of one or two layers with weights that are filled in.

    ``layout`` and ``hidden_size`` describe what crosses a boundary. Steps are repeated so many times, after one that shows
    what a new shape costs once; more often while their times spread, less often where they are long. No text grows beyond
    ``max_positions``.
    """

    request: int
    spec: ModelSpec
    spans: tuple[tuple[int, int], ...]
    kind_of_layer: tuple[int, ...]
    shapes: tuple[StepShape, ...]
    layout: tuple[bool, ...] | None
    hidden_size: int
    num_prefills: int
    num_decodes: int
    max_positions: int | None


class ProbeLink(Message, frozen=True, tag=8):
    """Measure the link to another party: send it ``Ping`` messages with so many bytes beside them, one after the other."""

    request: int
    target: str
    sizes: tuple[int, ...]


class Ping(Message, frozen=True, tag=9):
    """Answer with a ``Pong`` at once."""

    number: int


class Pong(Message, frozen=True, tag=10):
    """Answer to a ``Ping``."""

    number: int


# --- along the pipeline


class KVEditKind(enum.IntEnum):
    """What is done to a session's KV cache before the next step runs."""

    REORDER = 1
    CROP = 2
    RECORD = 3
    RESERVE = 4


class KVEdit(Message, frozen=True):
    """One edit of a session's KV.

    Row indices to keep, tokens to drop, whether dropped tokens must stay recoverable, or the tokens per row that are expected
    in all.
    """

    kind: KVEditKind
    values: tuple[int, ...]


class StageTimes(Message, frozen=True):
    """What one stage tells of a step: bytes of the message that came, and microseconds (see `lingualinked.telemetry.samples`)."""

    received_bytes: Natural
    hop_us: Natural
    wait_us: Natural
    compute_us: Natural
    codec_us: Natural


class Step(Message, frozen=True, tag=4):
    """Run one step of a session on stage ``stage``.

    The tensors beside it are, in order: the stage's inputs (token ids or embeddings, later the raw output of the
    previous stage's last layer), the mask if `MaskMode.FULL`, the positions if `PositionMode.FULL`, and the indices
    of the logits to keep if ``logits_to_keep`` is ``None``.

    ``rope_reach`` says how far the model's rotary embeddings are stretched before the step; 0 where they never are.
    ``torch_settings`` are those of the caller, by name, that are not torch's defaults, such as autocast: stages compute under them.
    ``timings`` grows by one element per stage passed. ``sent_us`` is the sender's clock, of which nothing but differences
    counts; it starts anew every 2^32 microseconds.
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


class EndSession(Message, frozen=True, tag=5):
    """Free a session's KV on stage ``stage`` and pass it on; it follows the session's steps, so none can come after it."""

    model: int
    plan_version: int
    stage: int
    session: int


# --- to the caller


class Hello(Message, frozen=True, tag=16):
    """A worker is ready; this is where its inbox listens."""

    pid: int
    address: str


class Progress(Message, frozen=True, tag=17):
    """How far a request has come: bytes of a stage loaded, or steps measured of each shape and span."""

    request: int
    num_done: int


class StageLoaded(Message, frozen=True, tag=18):
    """A stage is ready to serve."""

    request: int
    weight_bytes: int
    num_bytes_read: int


class Acknowledged(Message, frozen=True, tag=25):
    """Answer to `Emulate`, `Introduce`, `AnnounceMove` and `ForkSession`: it has been done."""

    request: int


class MeasuredStep(Message, frozen=True):
    """Seconds that one part of a model took in steps of one shape: median, and distance between the quartiles."""

    shape: StepShape
    seconds: float
    spread_s: float


class ModelMeasured(Message, frozen=True, tag=26):
    """Answer to `MeasureModel`: times of each kind of layer that was among the spans, and of the rest."""

    request: int
    hardware: str
    free_bytes: int
    layers: dict[int, tuple[MeasuredStep, ...]]
    stage: tuple[MeasuredStep, ...]
    prologue: tuple[MeasuredStep, ...]
    epilogue: tuple[MeasuredStep, ...]


class LinkProbed(Message, frozen=True, tag=27):
    """Answer to `ProbeLink`: seconds from each ``Ping`` to its ``Pong``, in the order of the sizes."""

    request: int
    seconds: tuple[float, ...]


class StageReport(Message, frozen=True):
    """One hosted stage, in the words of `lingualinked.telemetry.snapshot.StageSnapshot`."""

    model: int
    plan_version: int
    stage: int
    start: int
    end: int
    weight_bytes: int
    kv_bytes: int
    num_sessions: int
    num_steps: int
    compute_us: int
    sent_bytes: int


class WorkerReport(Message, frozen=True, tag=20):
    """Answer to `Inspect`."""

    request: int
    pid: int
    threads: int
    resident_bytes: int
    idle_resident_bytes: int
    num_refused: int
    held_bytes: int
    available_bytes: int
    cpu_percent: float
    temperature_c: float | None
    battery_percent: float | None
    on_battery: bool
    stages: tuple[StageReport, ...]


class StepDone(Message, frozen=True, tag=21):
    """The last stage's answer to a step; its logits travel beside it."""

    model: int
    session: int
    number: int
    timings: tuple[StageTimes, ...]


class FailureKind(enum.IntEnum):
    """What kind of error a worker's failure becomes in the caller."""

    ERROR = 0
    MEMORY = 1
    CHECKPOINT = 2
    ARGUMENT = 3


class RequestFailed(Message, frozen=True, tag=22):
    """A request could not be served."""

    request: int
    kind: FailureKind
    cause: str
    traceback: str


class KVRefused(Message, frozen=True, tag=30):
    """Answer to `CopyKV`, from the target: it could not use what came."""

    request: int
    model: int
    kind: FailureKind
    cause: str
    traceback: str


class StepFailed(Message, frozen=True, tag=23):
    """A stage raised while it ran a step; the session can't go on."""

    model: int
    session: int
    number: int
    kind: FailureKind
    cause: str
    traceback: str


class LogRecord(Message, frozen=True, tag=24):
    """A log record of the worker."""

    level: int
    logger: str
    text: str


PeerMessage = Step | EndSession | Ping | Pong | KVChunk | KVTaken | FetchWeight | WeightChunk
"""What workers say to each other."""

CallerMessage = (
    LoadStage
    | UnloadModel
    | Inspect
    | Emulate
    | Introduce
    | Dismiss
    | MeasureModel
    | ProbeLink
    | AnnounceMove
    | KeepPlan
    | CopyKV
    | MoveSession
    | ForkSession
    | Ping
    | Pong
    | Step
    | EndSession
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
    | StepDone
    | RequestFailed
    | StepFailed
    | LogRecord
)
AnyMessage = CallerMessage | PeerMessage | WorkerMessage

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Return the message's bytes."""
    return _encoder.encode(message)


def decode(payload: bytes) -> AnyMessage:
    """Read a message.

    Raises
    ------
    ProtocolError
        If the bytes are no known message, or a field has the wrong type.
    """
    try:
        return _decoder.decode(payload)
    except Exception as error:  # msgspec has errors of its own, and passes on those of text and of deep nesting
        raise ProtocolError(f"not a message of this protocol: {error}") from error

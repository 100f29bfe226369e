"""The messages between caller and workers, as msgspec structs, and their codec.

Knows neither who sends them nor over what. Tensors are sent with a message, never in it.
"""

from __future__ import annotations

import msgspec

from lingualinked.environment import Environment
from lingualinked.errors import ProtocolError
from lingualinked.model.spec import ModelSpec
from lingualinked.protocol.adapting import AddAdapter, RemoveAdapter
from lingualinked.protocol.base import Message, Natural, Positive
from lingualinked.protocol.boot import Emulation
from lingualinked.protocol.editing import EditTensor
from lingualinked.protocol.failures import KVRefused, RequestFailed, StepFailed
from lingualinked.protocol.gradients import AbandonBackward, BackwardDone, FreeGraph, ResumeBackward, RunBackward
from lingualinked.protocol.hooking import HookAnswered, HookReached
from lingualinked.protocol.measuring import LinkProbed, MeasureModel, ModelMeasured, Ping, PingWorker, Pong, ProbeLink
from lingualinked.protocol.moving import (
    AnnounceMove,
    CopyKV,
    FetchWeight,
    ForkSession,
    JoinSessions,
    KeepPlan,
    KVChunk,
    KVCopied,
    KVReceived,
    MoveSession,
    WeightChunk,
)
from lingualinked.protocol.packed import PackedDone, PackedFailed, PackedStep
from lingualinked.protocol.reading import ReadTensor, TensorRead
from lingualinked.protocol.running import BeginRun, EndRun, TokensChosen
from lingualinked.protocol.steps import EndSession, ShortcutTensors, Step, StepDone, StepGroup, StepRecorded
from lingualinked.protocol.weights import (
    FetchPart,
    FilePart,
    FilesFound,
    FindFiles,
    ShareFiles,
    StopSharing,
    WeightSupply,
)
from lingualinked.rounding import Invariance, Rounding
from lingualinked.telemetry.reports import StageSnapshot, WorkerSnapshot
from lingualinked.telemetry.samples import DeviceSample
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint

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


class ShortcutTarget(msgspec.Struct, frozen=True):
    """A later stage of a plan, the worker that runs it, and the shortcuts that a stage makes for it."""

    stage: Positive
    name: str
    shortcuts: tuple[str, ...]


class LoadStage(Message, frozen=True, tag=1):
    """Load layers ``[start, end)`` of a model as stage ``stage`` of a plan of ``num_stages``, between two parties.

    The stage accepts steps only from ``previous_name`` and sends its outputs to ``next_name``. All sessions together may
    hold ``max_kv_tokens`` rows x tokens of KV. The stage shares layers that stages of other versions hold on this worker.
    If the checkpoint's files can't be read here, or have changed, the other weights are fetched from their ``holders``;
    without holders, loading fails. A worker that does not read the caller's files has copies of its own, or fetches what it
    lacks from the ``supplies``. The stage sends what it makes for later ones to its ``shortcut_targets``, and runs a step once each
    of the ``shortcut_sources``, stages and their workers, has sent it what they make (`ShortcutTensors`).
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
    num_stages: Positive
    holders: tuple[WeightHolder, ...]
    supplies: tuple[WeightSupply, ...]
    shortcut_targets: tuple[ShortcutTarget, ...] = ()
    shortcut_sources: tuple[tuple[Natural, str], ...] = ()


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


class CutLinks(Message, frozen=True, tag=63):
    """Handle nothing that comes from these parties, and what has come from all others while their links were cut.

    This message and `EmulateDevice`, and their answers, pass links that are cut.
    """

    request: int
    senders: tuple[str, ...]


class IntroduceWorker(Message, frozen=True, tag=29):
    """Accept messages from another worker, which holds this key, and send its messages to this address.

    Memory is shared with it if it is on the same host.
    """

    request: int
    name: str
    public_key: str
    address: str
    same_host: bool = True


class ConnectPeer(Message, frozen=True, tag=80):
    """Connect to a worker that accepts messages from here; the answer comes once it is known whether that works."""

    request: int
    name: str


class ListenOverNetwork(Message, frozen=True, tag=81):
    """Listen at one more endpoint, for workers on other hosts."""

    request: int
    endpoint: TcpEndpoint


class DismissWorker(Message, frozen=True, tag=33):
    """Remove a worker that has ended; another one may be introduced under its name."""

    name: str


# --- to the caller


class Hello(Message, frozen=True, tag=16):
    """A worker is ready, computes with this, and its inbox listens at this address."""

    pid: int
    address: str
    environment: Environment


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
    invariance: Invariance | None = None  # of a stage that has to be batch-invariant


class Acknowledged(Message, frozen=True, tag=25):
    """Answer to `EmulateDevice`, `CutLinks`, `IntroduceWorker`, `PingWorker`, `AnnounceMove`, `ForkSession`, `EditTensor` and others: done."""

    request: int


class Listening(Message, frozen=True, tag=82):
    """Answer to `ListenOverNetwork`: where others reach the worker from now on."""

    request: int
    address: str


class PeerConnected(Message, frozen=True, tag=83):
    """Answer to `ConnectPeer`: the connection is there, or a few words say why not."""

    request: int
    why_not: str


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


class LogRecord(Message, frozen=True, tag=24):
    """A log record of a worker."""

    level: int
    logger: str
    text: str


PeerMessage = (
    Step
    | StepGroup
    | PackedStep
    | EndSession
    | ShortcutTensors
    | Ping
    | Pong
    | KVChunk
    | KVReceived
    | FetchWeight
    | WeightChunk
    | FetchPart
    | FilePart
)
"""The messages between workers."""

CallerMessage = (
    LoadStage
    | UnloadModel
    | InspectWorker
    | EmulateDevice
    | CutLinks
    | IntroduceWorker
    | ConnectPeer
    | ListenOverNetwork
    | DismissWorker
    | MeasureModel
    | ProbeLink
    | PingWorker
    | AnnounceMove
    | KeepPlan
    | CopyKV
    | MoveSession
    | ForkSession
    | JoinSessions
    | ReadTensor
    | EditTensor
    | AddAdapter
    | RemoveAdapter
    | FindFiles
    | ShareFiles
    | StopSharing
    | FilePart
    | Ping
    | Pong
    | Step
    | PackedStep
    | HookAnswered
    | EndSession
    | BeginRun
    | EndRun
    | RunBackward
    | ResumeBackward
    | AbandonBackward
    | FreeGraph
)
Request = (
    LoadStage
    | InspectWorker
    | EmulateDevice
    | CutLinks
    | MeasureModel
    | ProbeLink
    | PingWorker
    | AnnounceMove
    | CopyKV
    | ForkSession
    | JoinSessions
    | ReadTensor
    | EditTensor
    | RunBackward
    | AddAdapter
    | RemoveAdapter
    | ResumeBackward
    | FindFiles
    | ShareFiles
)
WorkerMessage = (
    Hello
    | Progress
    | StageLoaded
    | KVCopied
    | KVRefused
    | Acknowledged
    | Listening
    | PeerConnected
    | ModelMeasured
    | LinkProbed
    | Ping
    | Pong
    | WorkerReport
    | TensorRead
    | FilesFound
    | FetchPart
    | StepDone
    | TokensChosen
    | StepRecorded
    | PackedDone
    | PackedFailed
    | HookReached
    | BackwardDone
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

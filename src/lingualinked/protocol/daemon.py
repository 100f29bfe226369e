"""The conversation of a caller and a device's daemon, as msgspec structs, and its codec: a union of its own.

Knows neither who sends them nor over what. Nothing in it is secret, and no tensor or text of a model goes this way.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import msgspec

from lingualinked.errors import ProtocolError
from lingualinked.protocol.base import Message, Natural
from lingualinked.protocol.boot import Boot
from lingualinked.versions import Versions

MAX_FRAME_BYTES = 1 << 20
"""Of a message, each of which is one frame: a `Boot` names every party of its cluster."""

HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 2_000
"""A connection over which nothing was heard for this long is closed, by the threads of libzmq at each end."""

ANSWER_S = 4.5
"""Seconds in which a daemon is found, lets a caller in, and accepts a worker, or an error says why not."""

_MOST_TEXTS = 100
_MOST_CHARACTERS = 200


class HostFacts(Message, frozen=True):
    """What a daemon says of its host and of what it allows there."""

    name: str  # of the daemon
    versions: Versions
    system: str  # and its release
    processor: str
    num_cores: Natural  # that its workers may use
    threads: Natural  # that a worker computes with, unless its device states fewer
    accelerator: str  # of its workers
    memory_bytes: Natural  # of the host
    available_bytes: Natural  # of the host's memory, now
    leasable_bytes: Natural | None  # of what all workers together may take, now; None: no limit is set
    free_disk_bytes: Natural  # where weights are kept
    host_id: str  # equal for processes that can share memory
    allows_relays: bool
    advertise: str | None  # where others reach its workers: a host, or host:ports; None: where they reach the daemon


# --- from a caller to a daemon


class Enter(Message, frozen=True, tag=1):
    """The first message of a connection: a caller wants to use this daemon."""

    versions: Versions


class StartWorker(Message, frozen=True, tag=2):
    """Start a worker for a device of this name, within these limits; a connection has one at most."""

    name: str
    class_names: tuple[str, ...]  # transformers classes whose code it will need
    memory_bytes: Natural | None  # None: all that is not leased
    threads: Natural | None  # None: what the daemon says


class BootWorker(Message, frozen=True, tag=3):
    """The answer to `WorkerKeyMade`: who the worker is. What only its host knows in it is for the daemon to fill in."""

    boot: Boot


class OpenRelay(Message, frozen=True, tag=7):
    """Listen for a party, and forward its bytes to this numeric address, for as long as this connection lasts."""

    number: Natural
    host: str
    port: Natural


class Leave(Message, frozen=True, tag=4):
    """End the worker of this connection; the answer is `Left`."""


# --- from a daemon to a caller


class Entered(Message, frozen=True, tag=16):
    """Answer to `Enter`."""

    facts: HostFacts


class WorkerLeased(Message, frozen=True, tag=17):
    """Answer to `StartWorker`: the worker starts, and these limits are its own."""

    name: str
    memory_bytes: Natural | None  # None: no limit
    threads: Natural
    accelerator: str


class Refused(Message, frozen=True, tag=18):
    """Answer to `Enter` or `StartWorker`: no, and why; or what was granted is withdrawn."""

    reason: str


class WorkerKeyMade(Message, frozen=True, tag=19):
    """A worker has made its key pair, in its own process; it waits for `BootWorker`."""

    name: str
    public_key: str


class WorkerEnded(Message, frozen=True, tag=20):
    """A worker has ended, and how."""

    name: str
    how: str


class Beat(Message, frozen=True, tag=21):
    """The daemon is there, and its caller can still be reached: what can't be sent ends the caller's lease."""


class RelayOpened(Message, frozen=True, tag=23):
    """Answer to `OpenRelay`: the port at which others reach the relay, or why there is none."""

    number: Natural
    port: Natural | None
    reason: str


class Left(Message, frozen=True, tag=22):
    """Answer to `Leave`: the worker has ended."""


ToDaemon = Enter | StartWorker | BootWorker | OpenRelay | Leave
FromDaemon = Entered | WorkerLeased | Refused | WorkerKeyMade | WorkerEnded | Beat | RelayOpened | Left

_M = TypeVar("_M")
_encoder = msgspec.msgpack.Encoder()
_to_daemon: msgspec.msgpack.Decoder[ToDaemon] = msgspec.msgpack.Decoder(ToDaemon)
_from_daemon: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)


def encode(message: ToDaemon | FromDaemon) -> bytes:
    """Encode a message."""
    return _encoder.encode(message)


def check_texts(texts: Collection[str]) -> None:
    """Raise ProtocolError unless all are short and printable, and not too many: they go to logs and to other processes."""
    if len(texts) > _MOST_TEXTS or not all(text.isprintable() and len(text) <= _MOST_CHARACTERS for text in texts):
        raise ProtocolError(
            f"at most {_MOST_TEXTS} names of at most {_MOST_CHARACTERS} printable characters each are expected"
        )


def decode_to_daemon(payload: bytes) -> ToDaemon:
    """Decode what a caller sends, or raise ProtocolError if it is not a known message, or a field has the wrong type."""
    return _decode(_to_daemon, payload)


def decode_from_daemon(payload: bytes) -> FromDaemon:
    """Decode what a daemon sends, or raise ProtocolError as `decode_to_daemon` does."""
    return _decode(_from_daemon, payload)


def _decode(decoder: msgspec.msgpack.Decoder[_M], payload: bytes) -> _M:
    try:
        return decoder.decode(payload)
    except Exception as error:  # msgspec also raises errors of text decoding and of deep nesting
        raise ProtocolError(f"the payload is not a message between a caller and a daemon: {error}") from error

"""The messages that move layers and their KV between devices while a model runs, as msgspec structs.

Knows neither why they move nor how. Tensors are sent with a message, never in it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from lingualinked.protocol.base import Message, Natural
from lingualinked.protocol.steps import KVEdit


class StagePlace(Message, frozen=True):
    """The worker that holds layers ``[start, end)`` under a plan version."""

    name: str
    plan_version: int
    start: int
    end: int


class AnnounceMove(Message, frozen=True, tag=34):
    """Allow a model to move between two plan versions, in either direction, until `KeepPlan`.

    Until then the worker accepts KV of a layer from the worker that holds the layer under the other version, and lends
    weights to those of the ``borrowers`` that need them.
    """

    request: int
    model: int
    stages: tuple[StagePlace, ...]
    borrowers: tuple[str, ...]


class KeepPlan(Message, frozen=True, tag=11):
    """Free every stage of the model that has another plan version, with its sessions and any KV in transit."""

    model: int
    plan_version: int


class CopyKV(Message, frozen=True, tag=12):
    """Copy a session's KV of layers ``[start, end)`` from stage ``stage`` to a stage of another plan version elsewhere.

    The first copy is made while the session continues. A final one sends what has changed since, and the rest of the
    session's state; the session must be waiting before its step ``number``. The target answers with `KVCopied`.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    number: int
    start: int
    end: int
    target_version: int
    target_stage: int
    target_name: str
    is_final: bool


class KVSlice(Message, frozen=True):
    """Some tokens of one layer's KV; keys and values are sent with the message."""

    slot: Natural  # of the layer in the KV cache
    first: Natural  # position of the first token that the layer holds: the target drops earlier ones
    position: Natural  # of the first token sent here: what was sent before from there on is no longer valid
    capacity: Natural  # tokens that the layer has room for
    rows: tuple[int, ...] | None  # to keep, in this order, of what was sent before, before this is added; None: all


MODULES = -1
"""The slot of what modules keep of a session, whose places are the paths of attributes."""


class StateSlice(Message, frozen=True):
    """All that one layer keeps, if that is not full or sliding attention's KV; its tensors are sent with the message.

    ``tensors`` names for each of them, in order, the places that hold it, by paths with dots, and ``plain`` the other values
    by theirs. A ``version`` other than that sent before replaces it.
    """

    slot: int  # of the layer in the KV cache, or `MODULES`
    version: Natural
    tensors: tuple[tuple[str, ...], ...]
    plain: dict[str, bool | int | float | str | None]


class SessionState(Message, frozen=True):
    """A stage's state of a session apart from KV; a mask, the last positions and the source's mask, if any, are sent after the KV.

    ``lags`` say by how many tokens layers are behind that were skipped, by the slots of their KV.
    """

    number: Natural
    num_tokens: Natural
    records_past: bool
    reserved_tokens: int
    has_mask: bool
    has_positions: bool
    has_source_mask: bool
    lags: dict[Natural, Natural]


class KVChunk(Message, frozen=True, tag=13):
    """A part of a session's KV, from worker to worker; the next part is sent after `KVReceived`.

    Keys and values of each slice are sent with it, then the tensors of each state, then those that its ``state`` says.
    ``num_bytes`` counts the tensors of the whole copy so far; ``max_cache_len`` is that of the session (`Step`).
    """

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    slices: tuple[KVSlice, ...]
    states: tuple[StateSlice, ...]
    num_bytes: int
    max_cache_len: Natural
    is_last: bool
    state: SessionState | None


class KVReceived(Message, frozen=True, tag=14):
    """Answer to a `KVChunk`: it has been received, and was accepted or not."""

    request: int
    accepted: bool


class MoveSession(Message, frozen=True, tag=15):
    """Run a session under this plan version from now on: put its KV into the stages of that version, and free the rest."""

    model: int
    session: int
    plan_version: int


class ForkSession(Message, frozen=True, tag=40):
    """Copy a session, which must be before step ``number``, within stage ``stage``, as session ``fork``.

    Of its KV, only that of the first ``num_tokens`` tokens is copied, if that is not None.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    number: int
    fork: int
    num_tokens: Natural | None = None


class JoinedRows(Message, frozen=True):
    """The rows of a session that must be before step ``number``, once ``edits`` have been made of its KV."""

    session: int
    number: int
    edits: tuple[KVEdit, ...]


class JoinSessions(Message, frozen=True, tag=75):
    """Make one session, ``session``, of the rows of several within stage ``stage``, which end there."""

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    parts: Annotated[tuple[JoinedRows, ...], msgspec.Meta(min_length=1)]


class KVCopied(Message, frozen=True, tag=28):
    """Answer to `CopyKV`, from the target: all KV has been received, and its bytes."""

    request: int
    model: int
    num_bytes: int


class FetchWeight(Message, frozen=True, tag=31):
    """Send a part of a parameter that stage ``stage`` holds, from element ``first`` on.

    ``receipt`` is that of the last `WeightChunk` received from that worker in this move, or 0: only one may be in flight.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    parameter: str
    first: int
    receipt: int


class WeightChunk(Message, frozen=True, tag=32):
    """Answer to `FetchWeight`: as many elements as fit in one message, flat, sent with it; or the reason for sending none."""

    request: int
    model: int
    parameter: str
    first: int
    error: str
    receipt: int


MovingMessage = (
    AnnounceMove
    | CopyKV
    | KVChunk
    | KVReceived
    | MoveSession
    | ForkSession
    | JoinSessions
    | KeepPlan
    | FetchWeight
    | WeightChunk
)
"""The messages that move layers and sessions between plan versions, or copy a session."""

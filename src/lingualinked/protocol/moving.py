"""The messages with which layers and their KV change devices while a model runs, as msgspec structs.

Knows neither who decides nor how it is done; tensors travel beside a message, never in it.
"""

from __future__ import annotations

from lingualinked.protocol.message import Message, Natural


class StagePlace(Message, frozen=True):
    """Who holds layers ``[start, end)`` under a plan version."""

    name: str
    plan_version: int
    start: int
    end: int


class AnnounceMove(Message, frozen=True, tag=34):
    """A model is about to move between two plan versions, there or back; it ends with `KeepPlan`.

    Meanwhile KV of a layer is taken from who holds it under the other version, and weights are lent to ``borrowers`` that
    are to hold them.
    """

    request: int
    model: int
    stages: tuple[StagePlace, ...]
    borrowers: tuple[str, ...]


class KeepPlan(Message, frozen=True, tag=11):
    """Free every stage of the model that is of another plan version, what is on its way to such, and its sessions there."""

    model: int
    plan_version: int


class CopyKV(Message, frozen=True, tag=12):
    """Copy a session's KV of layers ``[start, end)`` from stage ``stage`` to a stage of another plan version elsewhere.

    The first copy is made while the session goes on. A final one sends what has changed since, and what else the stage
    knows of the session, which must be before its step ``number`` and wait there. The target answers with `KVCopied`.
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
    """Tokens of one layer's KV; keys and values are beside the message.

    Parameters
    ----------
    slot : int
        The layer's slot in the KV cache.
    first : int
        Position of the first token that the layer holds: what lies before is to be forgotten.
    position : int
        Position of the first token here: what was sent from there on before is not valid any more.
    capacity : int
        Tokens that the layer has room for.
    rows : tuple of int or None
        Which rows to keep of what was sent before, in their order, before these tokens are added; ``None``: all as they are.
    """

    slot: Natural
    first: Natural
    position: Natural
    capacity: Natural
    rows: tuple[int, ...] | None


class SessionState(Message, frozen=True):
    """What a stage knows of a session besides KV; the mask is beside the message, behind the KV, if it has one."""

    number: Natural
    num_tokens: Natural
    records_past: bool
    reserved_tokens: int
    has_mask: bool


class KVChunk(Message, frozen=True, tag=13):
    """A part of a session's KV, from worker to worker; the next one is sent when `KVTaken` has come.

    ``num_bytes`` counts the keys and values of the whole copy so far.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    slices: tuple[KVSlice, ...]
    num_bytes: int
    is_last: bool
    state: SessionState | None


class KVTaken(Message, frozen=True, tag=14):
    """Answer to a `KVChunk`: whether it could be used."""

    request: int
    accepted: bool


class MoveSession(Message, frozen=True, tag=15):
    """A session runs under this plan version from now on: take its KV over into the stages of it, and free the rest."""

    model: int
    session: int
    plan_version: int


class ForkSession(Message, frozen=True, tag=40):
    """Copy a session's KV in stage ``stage``, which must be before step ``number``, under another session's number."""

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    number: int
    fork: int


class KVCopied(Message, frozen=True, tag=28):
    """Answer to `CopyKV`, from the target: all has come, so many bytes of keys and values."""

    request: int
    model: int
    num_bytes: int


class FetchWeight(Message, frozen=True, tag=31):
    """Send a part of a parameter that stage ``stage`` holds, from element ``first`` on.

    ``receipt`` is that of the last `WeightChunk` that has come from there in this move, or 0: no more than one is on its way.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    parameter: str
    first: int
    receipt: int


class WeightChunk(Message, frozen=True, tag=32):
    """Answer to `FetchWeight`: so many elements as are in one message, flat, beside it; or why there are none."""

    request: int
    model: int
    parameter: str
    first: int
    error: str
    receipt: int


MovingMessage = (
    AnnounceMove | CopyKV | KVChunk | KVTaken | MoveSession | ForkSession | KeepPlan | FetchWeight | WeightChunk
)
"""What moves layers and sessions from one plan version to another, or copies a session."""

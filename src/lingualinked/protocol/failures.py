"""The messages that say that something failed in a worker, and why.

Knows texts and kinds of failures, not the caller's errors.
"""

from __future__ import annotations

import enum

from lingualinked.protocol.base import Message


class FailureKind(enum.IntEnum):
    """The kind of error that a worker's failure becomes in the caller."""

    ERROR = 0
    MEMORY = 1
    CHECKPOINT = 2
    ARGUMENT = 3
    RESOURCE = 4


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

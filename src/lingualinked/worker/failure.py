"""An exception in the words of the messages that tell of it.

Knows the kinds of failure that the caller tells apart.
"""

from __future__ import annotations

import traceback
from typing import TypedDict

from lingualinked.errors import ArgumentError, CheckpointError
from lingualinked.protocol.messages import FailureKind
from lingualinked.worker.limits import is_out_of_memory

_MAX_CHARACTERS = 16_000


class Failure(TypedDict):
    """The fields that `RequestFailed` and `StepFailed` share."""

    kind: FailureKind
    cause: str
    traceback: str


def failure_of(error: Exception) -> Failure:
    """Put an exception into words."""
    kind = FailureKind.ERROR
    if is_out_of_memory(error):
        kind = FailureKind.MEMORY
    elif isinstance(error, CheckpointError):
        kind = FailureKind.CHECKPOINT
    elif isinstance(error, ArgumentError):
        kind = FailureKind.ARGUMENT
    return {
        "kind": kind,
        "cause": _clip(f"{type(error).__name__}: {error}"),
        "traceback": _clip("".join(traceback.format_exception(error))),
    }


def _clip(text: str) -> str:
    """Leave out the middle of a text that would not fit into a message."""
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]}\n[...]\n{text[-half:]}"

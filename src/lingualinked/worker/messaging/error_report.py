"""Describes an exception in the fields of the messages that report it to the caller.

Knows the kinds of failure that the caller distinguishes.
"""

from __future__ import annotations

import traceback
from typing import TypedDict

from lingualinked.errors import ArgumentError, CheckpointError, ResourceError
from lingualinked.protocol.failures import FailureKind
from lingualinked.worker.process.limits import is_out_of_memory

_MAX_CHARACTERS = 16_000


class ErrorReport(TypedDict):
    """The fields that `RequestFailed`, `KVRefused` and `StepFailed` share."""

    kind: FailureKind
    cause: str
    traceback: str


def describe_error(error: Exception) -> ErrorReport:
    """Return the kind, the message and the traceback of an exception, clipped to fit into a message."""
    kind = FailureKind.ERROR
    if is_out_of_memory(error):
        kind = FailureKind.MEMORY
    elif isinstance(error, CheckpointError):
        kind = FailureKind.CHECKPOINT
    elif isinstance(error, ArgumentError):
        kind = FailureKind.ARGUMENT
    elif isinstance(error, ResourceError):
        kind = FailureKind.RESOURCE
    return {
        "kind": kind,
        "cause": _clip(f"{type(error).__name__}: {error}"),
        "traceback": _clip("".join(traceback.format_exception(error))),
    }


def _clip(text: str) -> str:
    """Cut out the middle of a text that is too long."""
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]}\n[...]\n{text[-half:]}"

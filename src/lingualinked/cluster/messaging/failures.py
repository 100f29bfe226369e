"""From what a worker says of a failure to the error that the caller raises.

Knows the messages and the exception tree; the remote traceback stays with every error.
"""

from __future__ import annotations

import copy

from lingualinked.cluster.workers.remote_text import readable
from lingualinked.errors import (
    ArgumentError,
    CheckpointError,
    DeviceMemoryError,
    LingualinkedError,
    ResourceError,
    WorkerError,
)
from lingualinked.protocol.failures import FailureKind, KVRefused, RequestFailed, StepFailed
from lingualinked.protocol.packed import PackedFailed, PackedFailure


def error_of(
    device: str, failure: RequestFailed | KVRefused | StepFailed | PackedFailed | PackedFailure
) -> LingualinkedError:
    """Make the caller's error of a worker's failure; if what was asked for is at fault, the worker's own is its cause."""
    cause, traceback = readable(failure.cause), readable(failure.traceback)
    if failure.kind is FailureKind.MEMORY:
        return DeviceMemoryError(device, cause, traceback)
    raised = WorkerError(device, cause, traceback)
    asked_for = {
        FailureKind.CHECKPOINT: CheckpointError,
        FailureKind.ARGUMENT: ArgumentError,
        FailureKind.RESOURCE: ResourceError,
    }.get(failure.kind)
    if asked_for is None:
        return raised
    error = asked_for(f"device {device!r}: {cause.partition(': ')[2]}")
    error.__cause__ = raised
    return error


def renewed(error: Exception) -> Exception:
    """Return an equal error without a traceback: one that is raised again and again keeps alive all whom it has reached."""
    again = copy.copy(error)
    again.__cause__ = error.__cause__
    return again

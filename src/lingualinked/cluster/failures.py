"""From what a worker says of a failure to the error that the caller raises.

Knows the messages and the exception tree; the remote traceback stays with every error.
"""

from __future__ import annotations

from lingualinked.errors import ArgumentError, CheckpointError, DeviceMemoryError, LingualinkedError, WorkerError
from lingualinked.protocol.messages import FailureKind, RequestFailed, StepFailed


def error_of(device: str, failure: RequestFailed | StepFailed) -> LingualinkedError:
    """Make the error that a worker's failure is to the caller.

    Parameters
    ----------
    device : str
        Name of the worker's device.
    failure : RequestFailed or StepFailed
        What it said.

    Returns
    -------
    LingualinkedError
        Where what was asked for is at fault, an error that says so, with the worker's own as its cause.
    """
    if failure.kind is FailureKind.MEMORY:
        return DeviceMemoryError(device, failure.cause, failure.traceback)
    raised = WorkerError(device, failure.cause, failure.traceback)
    asked_for = {FailureKind.CHECKPOINT: CheckpointError, FailureKind.ARGUMENT: ArgumentError}.get(failure.kind)
    if asked_for is None:
        return raised
    error = asked_for(f"device {device!r}: {failure.cause.partition(': ')[2]}")
    error.__cause__ = raised
    return error

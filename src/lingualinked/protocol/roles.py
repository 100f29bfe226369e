"""Who may send which message, in one table for each of its receivers.

Knows roles by name; who has one at a time is its receiver's to say.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from lingualinked.protocol import messages, moving
from lingualinked.protocol.message import Message


class Role(enum.Enum):
    """What a party is to the receiver of a message, in the plan in force."""

    CALLER = "the caller"
    WORKER = "a worker that the caller has introduced, or the caller"
    PREVIOUS = "the party before this stage in the plan, or the caller"
    KV_SOURCE = "a worker whose KV moves here, as the caller has announced"
    KV_TARGET = "the worker that the KV was sent to"
    BORROWER = "a worker that is to hold these weights, as the caller has announced"
    LENDER = "the worker that was asked for the weight"
    PROBED = "the party that was sent a Ping"
    LAST_STAGE = "the worker of the last stage that the step goes through"
    ANY_STAGE = "a worker of the stages that the step goes through"
    ASKED = "the worker that was asked"
    KV_ENDS = "one of the two workers between which KV is copied"


TO_WORKER: Mapping[type[Message], Role] = {
    messages.LoadStage: Role.CALLER,
    messages.UnloadModel: Role.CALLER,
    messages.Inspect: Role.CALLER,
    messages.Emulate: Role.CALLER,
    messages.Introduce: Role.CALLER,
    messages.Dismiss: Role.CALLER,
    messages.MeasureModel: Role.CALLER,
    messages.ProbeLink: Role.CALLER,
    moving.AnnounceMove: Role.CALLER,
    moving.KeepPlan: Role.CALLER,
    moving.CopyKV: Role.CALLER,
    moving.MoveSession: Role.CALLER,
    moving.ForkSession: Role.CALLER,
    messages.Ping: Role.WORKER,
    messages.Pong: Role.PROBED,
    messages.Step: Role.PREVIOUS,
    messages.EndSession: Role.PREVIOUS,
    moving.KVChunk: Role.KV_SOURCE,
    moving.KVTaken: Role.KV_TARGET,
    moving.FetchWeight: Role.BORROWER,
    moving.WeightChunk: Role.LENDER,
}
"""Who may send what to a worker; it takes nothing else."""

TO_CALLER: Mapping[type[Message], Role] = {
    messages.Hello: Role.WORKER,
    messages.LogRecord: Role.WORKER,
    messages.Ping: Role.WORKER,
    messages.Progress: Role.ASKED,
    messages.StageLoaded: Role.ASKED,
    messages.Acknowledged: Role.ASKED,
    messages.ModelMeasured: Role.ASKED,
    messages.LinkProbed: Role.ASKED,
    messages.WorkerReport: Role.ASKED,
    messages.RequestFailed: Role.ASKED,
    moving.KVCopied: Role.KV_ENDS,
    messages.KVRefused: Role.KV_ENDS,
    messages.StepDone: Role.LAST_STAGE,
    messages.StepFailed: Role.ANY_STAGE,
}
"""Who may send what to the caller; it takes nothing else."""

ANSWERS: Mapping[type[Message], type[Message]] = {
    messages.LoadStage: messages.StageLoaded,
    messages.Inspect: messages.WorkerReport,
    messages.Emulate: messages.Acknowledged,
    messages.Introduce: messages.Acknowledged,
    messages.MeasureModel: messages.ModelMeasured,
    messages.ProbeLink: messages.LinkProbed,
    moving.AnnounceMove: messages.Acknowledged,
    moving.CopyKV: moving.KVCopied,
    moving.ForkSession: messages.Acknowledged,
    messages.Step: messages.StepDone,
}
"""What answers a message of the caller's."""

"""Which role a party needs to send a message, in one table for each kind of receiver.

Knows roles by name; the receiver knows which party has a role at the moment.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from lingualinked.protocol import (
    adapting,
    editing,
    failures,
    gradients,
    hooking,
    measuring,
    messages,
    moving,
    packed,
    reading,
    running,
    steps,
    weights,
)
from lingualinked.protocol.base import Message


class Role(enum.Enum):
    """The role of a sender, as its receiver sees it under the current plan."""

    CALLER = "the caller"
    WORKER = "a worker that the caller has introduced, or the caller"
    PREVIOUS = "the party before this stage in the plan, before the first one in a run the last one, or the caller"
    EARLIER = "the worker of an earlier stage that makes something for this one"
    KV_SOURCE = "a worker from which KV moves here, as announced by the caller"
    KV_TARGET = "the worker that the KV was sent to"
    BORROWER = "a worker that needs these weights, as announced by the caller"
    LENDER = "the worker that was asked for the weight"
    FILE_BORROWER = "a worker that is loading a stage, of the files that it needs, as the caller has named it"
    FILE_SOURCE = "a party that the files of a stage are fetched from, as the caller has named it"
    PROBED = "the party that was sent a Ping"
    LAST_STAGE = "the worker of the last stage of the step"
    ANY_STAGE = "a worker of one of the stages of the step"
    ASKED = "the worker that the request was sent to"
    KV_ENDS = "one of the two workers between which KV is copied"


TO_WORKER: Mapping[type[Message], Role] = {
    messages.LoadStage: Role.CALLER,
    messages.UnloadModel: Role.CALLER,
    messages.InspectWorker: Role.CALLER,
    messages.EmulateDevice: Role.CALLER,
    messages.CutLinks: Role.CALLER,
    messages.IntroduceWorker: Role.CALLER,
    messages.ConnectPeer: Role.CALLER,
    messages.ListenOverNetwork: Role.CALLER,
    messages.DismissWorker: Role.CALLER,
    measuring.MeasureModel: Role.CALLER,
    measuring.ProbeLink: Role.CALLER,
    measuring.PingWorker: Role.CALLER,
    moving.AnnounceMove: Role.CALLER,
    moving.KeepPlan: Role.CALLER,
    moving.CopyKV: Role.CALLER,
    moving.MoveSession: Role.CALLER,
    moving.ForkSession: Role.CALLER,
    moving.JoinSessions: Role.CALLER,
    reading.ReadTensor: Role.CALLER,
    editing.EditTensor: Role.CALLER,
    adapting.AddAdapter: Role.CALLER,
    adapting.RemoveAdapter: Role.CALLER,
    measuring.Ping: Role.WORKER,
    measuring.Pong: Role.PROBED,
    steps.Step: Role.PREVIOUS,
    steps.StepGroup: Role.PREVIOUS,
    packed.PackedStep: Role.PREVIOUS,
    steps.EndSession: Role.PREVIOUS,
    steps.ShortcutTensors: Role.EARLIER,
    hooking.HookAnswered: Role.CALLER,
    running.BeginRun: Role.CALLER,
    running.EndRun: Role.CALLER,
    gradients.RunBackward: Role.CALLER,
    gradients.ResumeBackward: Role.CALLER,
    gradients.AbandonBackward: Role.CALLER,
    gradients.FreeGraph: Role.CALLER,
    moving.KVChunk: Role.KV_SOURCE,
    moving.KVReceived: Role.KV_TARGET,
    moving.FetchWeight: Role.BORROWER,
    moving.WeightChunk: Role.LENDER,
    weights.FindFiles: Role.CALLER,
    weights.ShareFiles: Role.CALLER,
    weights.StopSharing: Role.CALLER,
    weights.FetchPart: Role.FILE_BORROWER,
    weights.FilePart: Role.FILE_SOURCE,
}
"""The messages that a worker accepts, and from whom."""

TO_CALLER: Mapping[type[Message], Role] = {
    messages.Hello: Role.WORKER,
    messages.LogRecord: Role.WORKER,
    measuring.Ping: Role.WORKER,
    messages.Progress: Role.ASKED,
    messages.StageLoaded: Role.ASKED,
    messages.Acknowledged: Role.ASKED,
    messages.Listening: Role.ASKED,
    messages.PeerConnected: Role.ASKED,
    measuring.ModelMeasured: Role.ASKED,
    measuring.LinkProbed: Role.ASKED,
    messages.WorkerReport: Role.ASKED,
    reading.TensorRead: Role.ASKED,
    weights.FilesFound: Role.ASKED,
    weights.FetchPart: Role.FILE_BORROWER,
    gradients.BackwardDone: Role.ASKED,
    failures.RequestFailed: Role.ASKED,
    moving.KVCopied: Role.KV_ENDS,
    failures.KVRefused: Role.KV_ENDS,
    steps.StepDone: Role.LAST_STAGE,
    running.TokensChosen: Role.LAST_STAGE,
    failures.StepFailed: Role.ANY_STAGE,
    steps.StepRecorded: Role.ANY_STAGE,
    packed.PackedDone: Role.LAST_STAGE,
    packed.PackedFailed: Role.ANY_STAGE,
    hooking.HookReached: Role.ANY_STAGE,
}
"""The messages that the caller accepts, and from whom."""

ANSWERS: Mapping[type[Message], type[Message]] = {
    messages.LoadStage: messages.StageLoaded,
    messages.InspectWorker: messages.WorkerReport,
    messages.EmulateDevice: messages.Acknowledged,
    messages.CutLinks: messages.Acknowledged,
    messages.IntroduceWorker: messages.Acknowledged,
    messages.ConnectPeer: messages.PeerConnected,
    messages.ListenOverNetwork: messages.Listening,
    measuring.MeasureModel: measuring.ModelMeasured,
    measuring.ProbeLink: measuring.LinkProbed,
    measuring.PingWorker: messages.Acknowledged,
    moving.AnnounceMove: messages.Acknowledged,
    moving.CopyKV: moving.KVCopied,
    moving.ForkSession: messages.Acknowledged,
    moving.JoinSessions: messages.Acknowledged,
    reading.ReadTensor: reading.TensorRead,
    editing.EditTensor: messages.Acknowledged,
    gradients.RunBackward: gradients.BackwardDone,
    adapting.AddAdapter: messages.Acknowledged,
    adapting.RemoveAdapter: messages.Acknowledged,
    gradients.ResumeBackward: gradients.BackwardDone,
    weights.FindFiles: weights.FilesFound,
    weights.ShareFiles: messages.Acknowledged,
    steps.Step: steps.StepDone,
    packed.PackedStep: packed.PackedDone,
    running.BeginRun: running.TokensChosen,
}
"""The answer to each message of the caller that has one."""

"""The caller's end of a cluster's conversation: what was asked, what came back, who is there to talk to.

Knows messages, a mailbox and which workers live; neither threads nor processes. All of it runs on one thread.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import cast

import msgspec
from torch import Tensor

from lingualinked.cluster.messaging.awaited_answers import answer_key, check_answer, find_role, pending_key
from lingualinked.cluster.messaging.failures import error_of
from lingualinked.cluster.messaging.introductions import Introduction
from lingualinked.cluster.messaging.known_workers import KnownWorkers
from lingualinked.cluster.messaging.pending import Key, Pending, PendingAnswers
from lingualinked.cluster.messaging.reach import Reach
from lingualinked.cluster.packed.packed_reply import PackedAnswer
from lingualinked.cluster.steps.recorded import RecordedPart
from lingualinked.cluster.steps.step_reply import HookEvent, RunReply, RunStart, StepReply
from lingualinked.cluster.weights.file_sharing import FileSharing
from lingualinked.cluster.workers.remote_text import RemoteLog
from lingualinked.errors import ClosedError, ProtocolError, WorkerDiedError
from lingualinked.protocol.failures import KVRefused, RequestFailed, StepFailed
from lingualinked.protocol.gradients import BackwardDone
from lingualinked.protocol.hooking import HookAnswered, HookReached
from lingualinked.protocol.measuring import LinkProbed, ModelMeasured, Ping, Pong
from lingualinked.protocol.messages import (
    Acknowledged,
    AnyMessage,
    CallerMessage,
    DismissWorker,
    Hello,
    Listening,
    LogRecord,
    PeerConnected,
    Progress,
    StageLoaded,
    UnloadModel,
    WorkerMessage,
    WorkerReport,
    decode,
    encode,
)
from lingualinked.protocol.moving import KVCopied
from lingualinked.protocol.packed import PackedDone, PackedFailed
from lingualinked.protocol.reading import TensorRead
from lingualinked.protocol.roles import ANSWERS, Role
from lingualinked.protocol.running import TokensChosen
from lingualinked.protocol.steps import EndSession, Step, StepDone, StepRecorded
from lingualinked.protocol.weights import FetchPart, FilesFound
from lingualinked.transport.hosts.cut_links import CutLinks
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.wire.delivery import Delivery

logger = logging.getLogger("lingualinked.cluster")


class Exchange(KnownWorkers):
    """The requests that a cluster's caller has sent, and the answers that it awaits."""

    def __init__(
        self, mailbox: Mailbox, devices: Iterable[str], post: Callable[[Callable[[], None]], None], reach: Reach
    ) -> None:
        super().__init__(mailbox, devices, reach)
        self._pending = PendingAnswers()
        self._cut_links = CutLinks(mailbox)
        self.files = FileSharing(self._send, post)
        self._unloaded: set[int] = set()
        self._logs: dict[str, RemoteLog] = {}
        self._numbers = itertools.count(-1, -1)  # of its own requests; those of the others count upwards

    def drop_worker(self, device: str) -> None:
        """Drop a device: pending answers that depend on it fail. Does nothing if it is not known."""
        settled = self.settled.pop(device, None)
        if settled is None:
            return
        for known in (self.public_keys, self.pids, self.environments, self._logs):
            known.pop(device, None)
        if self.addresses.pop(device, None) is not None:
            for other in self.addresses.keys() - self.ended.keys():
                self._send(other, DismissWorker(name=device), ())
        self._connections.forget(device)
        self._mailbox.disconnect(device)
        self.files.lose_worker(device, "it is not part of the cluster any more")
        self._reach.forget(device)
        self.failed.pop(device, None)
        how = self.ended.pop(device, "it is not part of the cluster any more")
        self._pending.fail_device(device, lambda: WorkerDiedError(device, how))
        settled.set()

    def handle_next(self, timeout_s: float | None) -> None:
        """Wait for one message, until an answer is late or ``timeout_s`` is over, and handle it."""
        lefts_s = (self._pending.time_left(time.monotonic()), self._connections.time_left())
        left_s = min((left_s for left_s in lefts_s if left_s is not None), default=None)
        delivery = self._mailbox.receive(left_s if timeout_s is None else timeout_s)
        if delivery is not None:
            self.handle_delivery(delivery)
        self._connections.decide()
        self._pending.expire(time.monotonic())

    def handle_delivery(self, delivery: Delivery) -> None:
        """Handle a message; one that can't be handled is counted and logged, and affects nothing else."""
        if delivery.sender not in self.settled:
            return  # of a device that is forgotten: said before its worker ended
        kind = "no message"
        try:
            message = decode(delivery.payload)
            kind = type(message).__name__
            if not self._passes_cuts(message) and self._cut_links.hold(delivery):
                return
            self._check_role(message, delivery.sender)
            self._handle(cast("WorkerMessage", message), delivery)  # anything else has no role
        except ProtocolError as error:
            self._refuse(delivery.sender, kind, str(error))
        except Exception as error:  # a progress bar that can't be drawn, a log handler that raises
            self._refuse(delivery.sender, kind, f"{type(error).__name__}: {error}")
            logger.debug("a message from %r could not be handled", delivery.sender, exc_info=True)

    def _refuse(self, sender: str, kind: str, detail: str) -> None:
        """Count a message as unusable; a worker whose greeting that was will never be ready."""
        self._mailbox.refuse(sender, kind, detail)
        if kind in ("no message", "Hello") and sender not in self.pids and sender in self.settled:
            self.failed[sender] = ProtocolError(f"the greeting of device {sender!r} can't be used: {detail}")
            self.settled[sender].set()

    def cut_links(self, devices: Iterable[str]) -> None:
        """Handle no messages of these devices, and those of all others that have come while their links were cut."""
        for delivery in self._cut_links.cut(devices):
            self.handle_delivery(delivery)

    def send_request(
        self, device: str, message: CallerMessage, tensors: tuple[Tensor, ...], key: Key, pending: Pending
    ) -> None:
        """Send a message that has an answer, and register the answer; fail it at once if it can't come."""
        try:
            if pending.model in self._unloaded:
                raise ClosedError("the model is closed: make a new one with ShardedModel.from_pretrained")
            for name in pending.devices & self.ended.keys():
                raise WorkerDiedError(name, self.ended[name])
            self._send(device, message, tensors)
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            # Without this frame and its callers, which name the future (`result_of`).
            pending.future.set_exception(error.with_traceback(None))
        else:
            self._pending.add(key, pending)

    def send_step(
        self, devices: Sequence[str], step: Step, tensors: tuple[Tensor, ...], pending: Pending, run: RunStart | None
    ) -> None:
        """Send a step to the first of these devices; if it begins a run, tell the last one before."""
        if run is None:
            self.send_request(devices[0], step, tensors, ("step", step.session, step.number), pending)
            return
        key = ("run", step.session, 0)
        self.send_request(devices[-1], run.begin, run.state, key, pending)
        if self._pending.find(key) is pending:
            try:
                self._send(devices[0], step, tensors)
            except Exception as error:  # noqa: BLE001 - whoever waits raises it
                self._pending.fail(key, error.with_traceback(None))

    def answer_hooks(self, device: str, message: HookAnswered, tensors: tuple[Tensor, ...]) -> None:
        """Send what hooks have made of a call to the worker whose step waits for it; end the step if nobody waits for it."""
        key = ("step", message.session, message.number)
        if not self._pending.resume(key, time.monotonic()):
            self._end_paused_step(device, message)
            return
        try:
            self._send(device, message, tensors)
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            self._pending.fail(key, error)

    def end_session(self, devices: Sequence[str], message: EndSession) -> None:
        """Free a session on the stages on these devices: each tells the next one, unless one of them is dead.

        A step that is in progress fails.
        """
        self._pending.fail_session(message.session, lambda: ClosedError("the session was ended during a step"))
        self.send_command(devices[0], message, message.model)
        if not self.ended.keys().isdisjoint(devices):
            for stage, device in enumerate(devices[1:], 1):
                self.send_command(device, msgspec.structs.replace(message, stage=stage), message.model)

    def send_command(self, device: str, message: CallerMessage, model: int) -> None:
        """Send a message that has no answer, unless its worker is not there or its model is unloaded."""
        if device in self.addresses and device not in self.ended and model not in self._unloaded:
            self._send(device, message, ())

    def unload_model(self, model: int) -> None:
        """Make all workers free a model, and fail pending answers for it."""
        for device in self.addresses:
            self.send_command(device, UnloadModel(model=model), model)
        self._unloaded.add(model)
        self._pending.fail_model(model, lambda: ClosedError("the model was closed while it was in use"))

    def mark_dead(self, device: str, how: str) -> None:
        """Mark a worker as dead and fail every pending answer that depends on it."""
        if device not in self.settled:
            return
        self.ended[device] = how
        self._connections.forget(device)
        self._mailbox.disconnect(device)
        self.files.lose_worker(device, how)
        self._pending.fail_device(device, lambda: WorkerDiedError(device, how))
        self.settled[device].set()

    def close(self) -> None:
        """Fail all pending answers, and close the mailbox."""
        self.files.close()
        self._pending.fail_all(closed)
        for event in self.settled.values():
            event.set()
        self._mailbox.close()

    def _handle(self, message: WorkerMessage, delivery: Delivery) -> None:
        sender = delivery.sender
        match message:
            case StepDone() | TokensChosen() | StepRecorded() | PackedDone():
                self._handle_step(message, delivery)
            case BackwardDone():
                self._pending.complete(answer_key(message), (message, delivery.tensors))
            case TensorRead():
                self._pending.complete(answer_key(message), delivery.tensors)
            case HookReached():
                event = HookEvent(message, sender, delivery.tensors)
                if not self._pending.pause(answer_key(message), message.path, event, time.monotonic()):
                    self._end_paused_step(sender, message)
            case (
                StageLoaded()
                | KVCopied()
                | Acknowledged()
                | ModelMeasured()
                | LinkProbed()
                | WorkerReport()
                | FilesFound()
                | Listening()
                | PeerConnected()
            ):
                self._pending.complete(answer_key(message), message)
            case RequestFailed() | KVRefused() | StepFailed() | PackedFailed():
                self._pending.fail(pending_key(message, self._pending), error_of(sender, message))
            case Progress():
                self._pending.progress(answer_key(message), message.num_done, time.monotonic())
            case Hello():
                self.greet(message, sender)
            case FetchPart():
                self.files.send_part(message, sender)
            case Ping():
                self._mailbox.send(sender, encode(Pong(number=message.number)))
            case LogRecord():
                self._logs.setdefault(sender, RemoteLog(sender)).write(message)

    def _handle_step(self, message: StepDone | TokensChosen | StepRecorded | PackedDone, delivery: Delivery) -> None:
        key = answer_key(message)
        match message:
            case StepDone():
                pending = self._pending.find(key)
                reply = StepReply.of(message, delivery, {} if pending is None else pending.parts)
                self._pending.complete(key, reply)
            case TokensChosen():
                chosen = RunReply(message, delivery.tensors, delivery.num_bytes)
                self._pending.report(key, chosen, time.monotonic())
            case StepRecorded():
                self._pending.add_part(key, message.stage, RecordedPart.of(message, delivery.tensors))
            case PackedDone():
                self._pending.complete(key, PackedAnswer(message, delivery.tensors, delivery.num_bytes))

    def _passes_cuts(self, message: AnyMessage) -> bool:
        """Say whether it is an answer that comes over a link that is cut."""
        pending = self._pending.find(answer_key(message)) if isinstance(message, Acknowledged | RequestFailed) else None
        return pending is not None and pending.passes_cuts

    def _check_role(self, message: AnyMessage, sender: str) -> None:
        """Refuse a message that its sender may not send, or that does not answer what was asked."""
        role = find_role(message)
        pending = None if role is Role.WORKER else self._pending.find(pending_key(message, self._pending))
        if pending is not None:  # what nobody waits for any more changes nothing
            check_answer(message, sender, role, pending)

    def _ask_to_meet(self, device: str, make: Callable[[int], Introduction], what: str) -> Future[object]:
        message = make(next(self._numbers))
        pending = Pending(
            devices=frozenset([device]),
            asked=device,
            answer=ANSWERS[type(message)],
            model=None,
            what=what,
            timeout_s=math.inf,  # whoever waits for the device has a bound
            deadline=math.inf,
        )
        future = pending.future
        self.send_request(device, message, (), ("request", message.request, 0), pending)
        return future

    def _end_paused_step(self, device: str, message: HookReached | HookAnswered) -> None:
        """End a step that waits for hooks and that nobody awaits any more: its worker keeps its memory, and a thread."""
        ending = HookAnswered(
            model=message.model,
            plan_version=0,  # it ends under every one
            stage=message.stage,
            session=message.session,
            number=message.number,
            goes_on=False,
        )
        self.send_command(device, ending, message.model)

    def _send(self, device: str, message: CallerMessage, tensors: tuple[Tensor, ...]) -> None:
        self._mailbox.send(device, encode(message), tensors)


def closed() -> ClosedError:
    """Make the error of a cluster that is closed."""
    return ClosedError("the cluster is closed: make a new one")

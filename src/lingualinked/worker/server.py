"""The worker's loop: take a message, do what it says, pass the result on.

Knows messages, stages and one mailbox; all of it in one thread, so that nothing here needs a lock.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import NoReturn

import msgspec
import torch

from lingualinked.device import CALLER
from lingualinked.errors import LingualinkedError, ProtocolError
from lingualinked.model.memory import release_memory
from lingualinked.model.stage import Stage
from lingualinked.protocol.boot import Boot, Imitation
from lingualinked.protocol.messages import (
    Authorise,
    Authorised,
    CallerMessage,
    EndSession,
    FailureKind,
    Hello,
    Holder,
    Imitate,
    Imitated,
    Inspect,
    LoadStage,
    LogRecord,
    MeasureModel,
    ModelMeasured,
    PeerMessage,
    Ping,
    Pong,
    ProbeLink,
    Progress,
    RequestFailed,
    StageLoaded,
    StageTimes,
    Step,
    StepDone,
    StepFailed,
    UnloadModel,
    WorkerMessage,
    WorkerReport,
    encode,
)
from lingualinked.protocol.moving import (
    CopyKV,
    FetchWeight,
    KeepPlan,
    KVChunk,
    KVTaken,
    MoveSession,
    WeightChunk,
)
from lingualinked.transport.hop_clock import HopClock, clock_us
from lingualinked.transport.keys import KeyPair
from lingualinked.transport.mailbox import Delivery, Mailbox
from lingualinked.transport.zmq_mailbox import ZmqMailbox
from lingualinked.worker.background import Background
from lingualinked.worker.failure import failure_of
from lingualinked.worker.hosted import split_tensors
from lingualinked.worker.inbox import Inbox
from lingualinked.worker.lender import Lender
from lingualinked.worker.lifeline import Lifeline
from lingualinked.worker.limits import apply_limits, describe_hardware, free_bytes, resident_bytes
from lingualinked.worker.logs import ForwardingHandler, forward_logs
from lingualinked.worker.measure import Measurer
from lingualinked.worker.mover import Mover
from lingualinked.worker.pace import Pace
from lingualinked.worker.probe import LinkProbes
from lingualinked.worker.stages import HostedStages, StageKey
from lingualinked.worker.vitals import Vitals

logger = logging.getLogger("lingualinked.worker")


def serve(boot: Boot, channel: int) -> None:
    """Be the worker that ``boot`` describes until the caller is gone.

    Parameters
    ----------
    boot : Boot
        Who this worker is, and what it may use.
    channel : int
        Descriptor of the socket whose other end the caller holds.
    """
    apply_limits(boot.threads, boot.cpus, boot.memory_bytes)  # first, since threads inherit their cores
    Lifeline(channel, boot.caller_pid, boot.socket_folder)
    handler = forward_logs(boot.log_level)
    mailbox = ZmqMailbox(
        boot.name,
        KeyPair(boot.public_key, boot.secret_key),
        boot.authorised,
        socket_folder=boot.socket_folder,
        max_frame_bytes=boot.max_frame_bytes,
    )
    handler.on_record = mailbox.wake
    background = Background(mailbox.wake)
    try:
        mailbox.connect(CALLER, boot.caller_address, boot.caller_key)
        Worker(boot, mailbox, handler, background).run()
    finally:
        background.stop()
        mailbox.close()


class Worker:
    """Serves the messages of one mailbox.

    Parameters
    ----------
    boot : Boot
        Who this worker is, and what it may use.
    mailbox : Mailbox
        Connected to the caller.
    handler : ForwardingHandler
        Holds the log records that go to the caller.
    background : Background
        Where stages are loaded.
    """

    def __init__(self, boot: Boot, mailbox: Mailbox, handler: ForwardingHandler, background: Background) -> None:
        self._boot = boot
        self._mailbox = mailbox
        self._inbox = Inbox(mailbox)
        self._log_handler = handler
        self._background = background
        self._stages = HostedStages(boot.accelerator, self._background)
        self._mover = Mover(self._stages, mailbox, boot.public_key)
        self._lender = Lender(self._stages)
        self._hops = HopClock()
        self._idle_resident_bytes = resident_bytes()
        self._vitals = Vitals(boot.accelerator, boot.memory_bytes)
        self._probes = LinkProbes(mailbox, boot.public_key)
        self._pace = Pace(boot.threads, 1.0)
        self._imitate(boot.imitation)

    def run(self) -> NoReturn:
        """Say hello, then serve for good: the lifeline ends the process."""
        self._tell(Hello(pid=os.getpid(), address=self._mailbox.address))
        while True:
            waiting = self._inbox.next()
            if waiting is not None:
                message, delivery = waiting
                try:
                    self._handle(message, delivery)
                except Exception as error:  # noqa: BLE001 - it costs that message alone, whatever it is
                    self._inbox.refuse(delivery, error, type(message).__name__)
            self._background.run_callbacks()
            for level, name, text in self._log_handler.drain():
                self._tell(LogRecord(level=level, logger=name, text=text))

    def _handle(self, message: CallerMessage | PeerMessage, delivery: Delivery) -> None:
        match message:
            case Step():
                self._step(message, delivery)
            case EndSession():
                self._end_session(message)
            case LoadStage():
                self._load(message)
            case UnloadModel():
                self._mover.forget(message.model)
                self._lender.forget()
                self._stages.unload(message.model)
            case FetchWeight():
                self._lend(message, delivery.sender)
            case WeightChunk():
                self._stages.take_weight(message, tuple(delivery.tensors))
            case CopyKV() | KVChunk() | KVTaken() | MoveSession() | KeepPlan():
                self._handle_moving(message, delivery)
            case Inspect():
                self._answer(message.request, lambda: self._report(message))
            case Imitate():
                self._answer(message.request, lambda: self._throttle(message))
            case Authorise():
                self._answer(message.request, lambda: self._authorise(message))
            case MeasureModel():
                self._answer(message.request, lambda: self._measure(message))
            case ProbeLink():
                self._answer(message.request, lambda: self._probes.begin(message))
            case Ping():
                self._probes.answer(message, delivery.sender)
            case Pong():
                self._probed(message, delivery.sender)

    def _handle_moving(self, message: CopyKV | KVChunk | KVTaken | MoveSession | KeepPlan, delivery: Delivery) -> None:
        match message:
            case CopyKV():
                self._answer(message.request, lambda: self._mover.copy(message))
            case KVChunk():
                self._take_kv(message, delivery)
            case KVTaken():
                self._answer(message.request, lambda: self._mover.go_on(message))
            case MoveSession():
                try:
                    self._stages.move_session(message.model, message.session, message.plan_version)
                except ProtocolError as error:  # it has ended on its way; if not, its next step fails
                    logger.debug("session %d is not moved: %s", message.session, error)
            case KeepPlan():
                self._mover.forget(message.model)
                self._lender.forget()
                self._stages.keep_plan(message.model, message.plan_version)

    def _answer(self, request: int, serve_request: Callable[[], WorkerMessage | None]) -> bool:
        """Tell the caller what a request comes to, unless another party will; say whether it could be served."""
        try:
            answer = serve_request()
        except Exception as error:  # noqa: BLE001 - the caller raises it
            self._fail(request, error)
            return False
        if answer is not None:
            self._tell(answer)
        return True

    def _fail(self, request: int, error: Exception) -> None:
        self._tell(RequestFailed(request=request, **failure_of(error)))

    def _load(self, message: LoadStage) -> None:
        def progress(num_bytes: int) -> None:
            self._tell(Progress(request=message.request, num_done=num_bytes))

        def loaded(stage: Stage) -> None:
            self._answer(message.request, lambda: self._put_in_service(message, stage))

        def fetch(holder: Holder, parameter: str, first: int) -> None:
            self._fetch(message.request, holder, parameter, first)

        self._stages.load(message, progress, loaded, lambda error: self._fail(message.request, error), fetch)

    def _put_in_service(self, message: LoadStage, stage: Stage) -> StageLoaded:
        if message.next_name != CALLER:
            self._mailbox.connect(message.next_name, message.next_address, message.next_key)
        weight_bytes, num_bytes_read = stage.weight_bytes, stage.num_bytes_read
        return StageLoaded(request=message.request, weight_bytes=weight_bytes, num_bytes_read=num_bytes_read)

    def _fetch(self, request: int, holder: Holder, parameter: str, first: int) -> None:
        message = FetchWeight(
            request=request,
            model=holder.model,
            plan_version=holder.plan_version,
            stage=holder.stage,
            parameter=parameter,
            first=first,
            sender_address=self._mailbox.address,
            sender_key=self._boot.public_key,
        )
        if holder.name == self._boot.name:
            self._stages.take_weight(*self._lender.lend(message))
            return
        try:
            self._mailbox.connect(holder.name, holder.address, holder.key)
            self._mailbox.send(holder.name, encode(message))
        except LingualinkedError as error:
            refused = WeightChunk(request=request, parameter=parameter, first=first, error=str(error))
            self._stages.take_weight(refused, ())

    def _lend(self, message: FetchWeight, sender: str) -> None:
        answer, tensors = self._lender.lend(message)
        self._mailbox.connect(sender, message.sender_address, message.sender_key)
        self._mailbox.send(sender, encode(answer), tensors)

    def _take_kv(self, message: KVChunk, delivery: Delivery) -> None:
        accepted = self._answer(message.request, lambda: self._mover.take(message, delivery.tensors))
        if not message.is_last:
            answer = KVTaken(request=message.request, accepted=accepted)
            self._mailbox.connect(delivery.sender, message.sender_address, message.sender_key)
            self._mailbox.send(delivery.sender, encode(answer))

    def _report(self, message: Inspect) -> WorkerReport:
        held_bytes = self._stages.held_bytes()
        vitals = self._vitals.look(held_bytes)
        return WorkerReport(
            request=message.request,
            pid=os.getpid(),
            threads=torch.get_num_threads(),
            resident_bytes=resident_bytes(),
            idle_resident_bytes=self._idle_resident_bytes,
            num_refused=self._mailbox.num_refused,
            held_bytes=held_bytes,
            available_bytes=vitals.available_bytes,
            cpu_percent=vitals.cpu_percent,
            temperature_c=vitals.temperature_c,
            battery_percent=vitals.battery_percent,
            on_battery=vitals.on_battery,
            stages=self._stages.reports(),
        )

    def _throttle(self, message: Imitate) -> Imitated:
        self._imitate(message.imitation)
        return Imitated(request=message.request)

    def _imitate(self, imitation: Imitation) -> None:
        self._pace.slowdown = imitation.slowdown
        for link in imitation.links:
            bandwidth = math.inf if link.bandwidth_bytes_per_s is None else link.bandwidth_bytes_per_s
            self._mailbox.shape(link.target, bandwidth, link.latency_s)

    def _authorise(self, message: Authorise) -> Authorised:
        self._mailbox.authorise(message.name, message.public_key)
        return Authorised(request=message.request)

    def _measure(self, message: MeasureModel) -> ModelMeasured:
        def progress(num_done: int) -> None:
            self._tell(Progress(request=message.request, num_done=num_done))

        times = Measurer(message, self._boot.accelerator, self._pace, progress).run()
        return ModelMeasured(
            request=message.request,
            hardware=describe_hardware(self._boot.accelerator),
            free_bytes=free_bytes(self._boot.accelerator),
            layers={part: steps for part, steps in times.items() if isinstance(part, int)},
            stage=times.get("stage", ()),
            prologue=times.get("prologue", ()),
            epilogue=times.get("epilogue", ()),
        )

    def _probed(self, message: Pong, sender: str) -> None:
        answer = self._probes.take(message, sender)
        if answer is not None:
            self._tell(answer)

    def _step(self, step: Step, delivery: Delivery) -> None:
        try:
            self._run_step(step, delivery)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            failure = failure_of(error)
        else:
            return
        self._tell(StepFailed(session=step.session, number=step.number, **failure))
        if failure["kind"] is FailureKind.MEMORY:
            release_memory(self._boot.accelerator)  # what the step had got; until here its error held it

    def _run_step(self, step: Step, delivery: Delivery) -> None:
        hop_us, wait_us = self._hops.part(delivery.sender, step.sent_us, delivery.due_s)
        if step.number and not self._stages.has_session(step.model, step.plan_version, step.session):
            # It has been told to move, and this step has come faster than the word of it.
            self._stages.move_session(step.model, step.session, step.plan_version)
        hosted = self._stages.get(StageKey(step.model, step.plan_version, step.stage))
        output, elapsed_s = hosted.run(step, delivery.tensors, self._pace)
        encode_us = round(self._mailbox.encode_s * 1e6)  # of the message before this one
        times = StageTimes(
            received_bytes=delivery.num_bytes,
            hop_us=hop_us,
            wait_us=wait_us,
            compute_us=round(elapsed_s * 1e6),
            codec_us=round(delivery.decode_s * 1e6) + encode_us,
        )
        timings = (*step.timings, times)
        if hosted.stage.is_last:
            done = StepDone(session=step.session, number=step.number, timings=timings)
            hosted.sent_bytes += self._mailbox.send(CALLER, encode(done), output.tensors)
            return
        onward = msgspec.structs.replace(
            step, stage=step.stage + 1, layout=output.layout, timings=timings, sent_us=clock_us() + encode_us
        )
        parts = split_tensors(step, delivery.tensors)
        tensors = (*output.tensors, *parts.told, *parts.keep)
        hosted.sent_bytes += self._mailbox.send(hosted.next_name, encode(onward), tensors)

    def _end_session(self, message: EndSession) -> None:
        self._stages.end_session(message.model, message.session)
        try:
            hosted = self._stages.get(StageKey(message.model, message.plan_version, message.stage))
        except ProtocolError:
            return  # the model went before its session, and took the KV along
        if not hosted.stage.is_last:
            onward = msgspec.structs.replace(message, stage=message.stage + 1)
            self._mailbox.send(hosted.next_name, encode(onward))

    def _tell(self, message: WorkerMessage) -> None:
        self._mailbox.send(CALLER, encode(message))

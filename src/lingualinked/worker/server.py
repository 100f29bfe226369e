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
from lingualinked.errors import ProtocolError
from lingualinked.model.memory import release_memory
from lingualinked.model.stage import Stage
from lingualinked.protocol.boot import Boot, Emulation
from lingualinked.protocol.measuring import MeasureModel, ModelMeasured, Ping, Pong, ProbeLink
from lingualinked.protocol.messages import (
    Acknowledged,
    CallerMessage,
    DismissWorker,
    EmulateDevice,
    EndSession,
    FailureKind,
    Hello,
    InspectWorker,
    IntroduceWorker,
    KVRefused,
    LoadStage,
    LogRecord,
    PeerMessage,
    Progress,
    RequestFailed,
    StageLoaded,
    StageTimes,
    Step,
    StepDone,
    StepFailed,
    UnloadModel,
    WeightHolder,
    WorkerMessage,
    WorkerReport,
    encode,
)
from lingualinked.protocol.moving import (
    AnnounceMove,
    CopyKV,
    FetchWeight,
    ForkSession,
    KeepPlan,
    KVChunk,
    KVReceived,
    MoveSession,
    MovingMessage,
    WeightChunk,
)
from lingualinked.transport.delivery import Delivery
from lingualinked.transport.hop_clock import HopClock, clock_us
from lingualinked.transport.keys import KeyPair
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.zmq_mailbox import ZmqMailbox
from lingualinked.worker.background import Background
from lingualinked.worker.borrower import Borrower
from lingualinked.worker.failure import failure_of
from lingualinked.worker.hosted import split_tensors
from lingualinked.worker.inbox import Inbox
from lingualinked.worker.lender import Lender
from lingualinked.worker.lifeline import Lifeline
from lingualinked.worker.limits import apply_limits, describe_hardware, free_bytes, resident_bytes
from lingualinked.worker.logs import ForwardingHandler, forward_logs
from lingualinked.worker.measure import Measurer
from lingualinked.worker.mover import Mover
from lingualinked.worker.moves import AnnouncedMoves
from lingualinked.worker.pace import Pace
from lingualinked.worker.peers import Peers
from lingualinked.worker.probe import LinkProbes
from lingualinked.worker.roles import Roles, StaleMessageError
from lingualinked.worker.stages import HostedStages, StageKey
from lingualinked.worker.vitals import Vitals

logger = logging.getLogger("lingualinked.worker")


def serve(boot: Boot, keys: KeyPair, channel: int) -> None:
    """Be the worker that ``boot`` describes until the caller is gone.

    Parameters
    ----------
    boot : Boot
        Who this worker is, and what it may use.
    keys : KeyPair
        Its own; the caller takes messages under them.
    channel : int
        Descriptor of the socket whose other end the caller holds.
    """
    apply_limits(boot.threads, boot.cpus, boot.memory_bytes)  # first, since threads inherit their cores
    Lifeline(channel, boot.caller_pid, boot.socket_folder)
    handler = forward_logs(boot.log_level)
    mailbox = ZmqMailbox(
        boot.name,
        keys,
        {boot.caller_key: CALLER},  # the others are introduced when they are ready
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
        self._log_handler = handler
        self._background = background
        self._stages = HostedStages(boot.accelerator, self._background)
        self._peers = Peers(mailbox)
        self._moves = AnnouncedMoves()
        self._mover = Mover(self._stages, self._peers, self._moves)
        self._lender = Lender(self._stages, self._moves)
        self._borrower = Borrower(boot.name, self._stages, self._lender, self._peers)
        self._early: dict[tuple[int, int, int], tuple[Step, Delivery]] = {}  # steps that wait for word of a move
        self._hops = HopClock()
        self._idle_resident_bytes = resident_bytes()
        self._vitals = Vitals(boot.accelerator, boot.memory_bytes)
        self._probes = LinkProbes(self._peers)
        self._inbox = Inbox(mailbox, Roles(self._peers, self._stages, self._mover, self._lender, self._probes).check)
        self._pace = Pace(boot.threads, 1.0)
        self._emulate(boot.emulation)

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
        if isinstance(message, MovingMessage):
            self._handle_moving(message, delivery)
            return
        match message:
            case Step():
                self._step(message, delivery)
            case EndSession():
                self._end_session(message)
            case LoadStage():
                self._load(message)
            case UnloadModel():
                self._forget_moves(message.model)
                self._stages.unload(message.model)
            case InspectWorker():
                self._answer(message.request, lambda: self._report(message))
            case EmulateDevice():
                self._answer(message.request, lambda: self._throttle(message))
            case IntroduceWorker():
                self._answer(message.request, lambda: self._introduce(message))
            case DismissWorker():
                self._peers.dismiss(message)
            case MeasureModel():
                self._answer(message.request, lambda: self._measure(message))
            case ProbeLink():
                self._answer(message.request, lambda: self._probes.begin(message))
            case Ping():
                self._probes.answer(message, delivery.sender)
            case Pong():
                self._probed(message, delivery.sender)

    def _handle_moving(self, message: MovingMessage, delivery: Delivery) -> None:
        match message:
            case FetchWeight():
                self._peers.send(delivery.sender, *self._lender.lend(message, delivery.sender))
            case WeightChunk():
                self._borrower.receive(message, delivery.sender, delivery.tensors)
            case AnnounceMove():
                self._forget_moves(message.model)
                self._moves.announce(message)
                self._tell(Acknowledged(request=message.request))
            case CopyKV():
                self._answer(message.request, lambda: self._mover.copy(message))
            case KVChunk():
                self._take_kv(message, delivery)
            case KVReceived():
                self._answer(message.request, lambda: self._mover.go_on(message))
            case MoveSession():
                self._move_session(message)
            case ForkSession():
                self._answer(message.request, lambda: self._stages.fork_session(message))
            case KeepPlan():
                self._forget_moves(message.model)
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

        def fetch(holder: WeightHolder, parameter: str, first: int) -> None:
            self._borrower.fetch(message.request, holder, parameter, first)

        self._stages.load(message, progress, loaded, lambda error: self._fail(message.request, error), fetch)

    def _put_in_service(self, message: LoadStage, stage: Stage) -> StageLoaded:
        weight_bytes, num_bytes_read = stage.weight_bytes, stage.num_bytes_read
        return StageLoaded(request=message.request, weight_bytes=weight_bytes, num_bytes_read=num_bytes_read)

    def _forget_moves(self, model: int) -> None:
        """End what is under way of a model that moves, or let a move of it begin anew."""
        self._moves.forget(model)
        self._mover.forget(model)
        self._lender.forget(model)
        self._borrower.forget(model)
        for key in [key for key in self._early if key[0] == model]:
            step, delivery = self._early.pop(key)
            error = StaleMessageError(f"a step of session {step.session}, which has not moved to its plan version")
            self._inbox.refuse(delivery, error, "Step")

    def _move_session(self, message: MoveSession) -> None:
        try:
            self._stages.move_session(message.model, message.session, message.plan_version)
        except ProtocolError as error:  # it has ended on its way; if not, its next step fails
            logger.debug("session %d is not moved: %s", message.session, error)
        early = self._early.pop((message.model, message.plan_version, message.session), None)
        if early is not None:
            self._serve_step(*early)

    def _take_kv(self, message: KVChunk, delivery: Delivery) -> None:
        accepted = True
        try:
            copied = self._mover.take(message, delivery.sender, delivery.tensors)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            accepted = False
            self._tell(KVRefused(request=message.request, model=message.model, **failure_of(error)))
        else:
            if copied is not None:
                self._tell(copied)
        if not message.is_last:
            self._peers.send(delivery.sender, KVReceived(request=message.request, accepted=accepted))

    def _report(self, message: InspectWorker) -> WorkerReport:
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

    def _throttle(self, message: EmulateDevice) -> Acknowledged:
        self._emulate(message.emulation)
        return Acknowledged(request=message.request)

    def _emulate(self, emulation: Emulation) -> None:
        self._pace.slowdown = emulation.slowdown
        self._mailbox.expect_delays(emulation.delayed_from)
        for link in emulation.links:
            bandwidth = math.inf if link.bandwidth_bytes_per_s is None else link.bandwidth_bytes_per_s
            self._mailbox.shape_link(link.target, bandwidth, link.latency_s)

    def _introduce(self, message: IntroduceWorker) -> Acknowledged:
        self._peers.introduce(message)
        return Acknowledged(request=message.request)

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
        if self._stages.is_due(step):
            self._serve_step(step, delivery)
        else:
            self._early[step.model, step.plan_version, step.session] = step, delivery

    def _serve_step(self, step: Step, delivery: Delivery) -> None:
        try:
            self._run_step(step, delivery)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            failure = failure_of(error)
        else:
            return
        self._tell(StepFailed(model=step.model, session=step.session, number=step.number, **failure))
        if failure["kind"] is FailureKind.MEMORY:
            release_memory(self._boot.accelerator)  # what the step had got; until here its error held it

    def _run_step(self, step: Step, delivery: Delivery) -> None:
        hop_us, wait_us = self._hops.split_delay(delivery.sender, step.sent_us, delivery.due_s)
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
            done = StepDone(model=step.model, session=step.session, number=step.number, timings=timings)
            hosted.sent_bytes += self._mailbox.send(CALLER, encode(done), output.tensors)
            return
        onward = msgspec.structs.replace(
            step, stage=step.stage + 1, layout=output.layout, timings=timings, sent_us=clock_us() + encode_us
        )
        parts = split_tensors(step, delivery.tensors)
        tensors = (*output.tensors, *parts.told, *parts.keep)
        hosted.sent_bytes += self._peers.send(hosted.next_name, onward, tensors)

    def _end_session(self, message: EndSession) -> None:
        self._stages.end_session(message.model, message.session, message.plan_version)
        self._early.pop((message.model, message.plan_version, message.session), None)
        try:
            hosted = self._stages.get(StageKey(message.model, message.plan_version, message.stage))
        except ProtocolError:
            return  # the model went before its session, and took the KV along
        if not hosted.stage.is_last:
            onward = msgspec.structs.replace(message, stage=message.stage + 1)
            self._peers.send(hosted.next_name, onward)

    def _tell(self, message: WorkerMessage) -> None:
        self._mailbox.send(CALLER, encode(message))

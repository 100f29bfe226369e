"""The worker's loop: receive a message, handle it, send the result on.

Knows messages, stages and one mailbox, all in one thread, so that nothing here needs a lock.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import NoReturn

import msgspec

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.model.process.environment_probe import read_environment
from lingualinked.model.stages.stage import Stage
from lingualinked.protocol.adapting import AddAdapter, RemoveAdapter
from lingualinked.protocol.boot import Boot, Emulation
from lingualinked.protocol.editing import EditTensor
from lingualinked.protocol.failures import KVRefused, RequestFailed
from lingualinked.protocol.gradients import AbandonBackward, BackwardMessage, FreeGraph, ResumeBackward, RunBackward
from lingualinked.protocol.hooking import HookAnswered
from lingualinked.protocol.measuring import MeasureModel, ModelMeasured, Ping, PingWorker, Pong, ProbeLink
from lingualinked.protocol.messages import (
    Acknowledged,
    CallerMessage,
    ConnectPeer,
    CutLinks,
    DismissWorker,
    EmulateDevice,
    Hello,
    InspectWorker,
    IntroduceWorker,
    ListenOverNetwork,
    LoadStage,
    LogRecord,
    PeerMessage,
    Progress,
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
    JoinSessions,
    KeepPlan,
    KVChunk,
    KVReceived,
    MoveSession,
    MovingMessage,
    WeightChunk,
)
from lingualinked.protocol.packed import PackedStep
from lingualinked.protocol.reading import ReadTensor
from lingualinked.protocol.running import BeginRun, EndRun, RunMessage
from lingualinked.protocol.steps import EndSession, ShortcutTensors, Step
from lingualinked.protocol.weights import FindFiles, ShareFiles, WeightMessage
from lingualinked.transport.keys.keys import KeyPair
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.worker.background import Background
from lingualinked.worker.hooks.backward_runner import BackwardRunner
from lingualinked.worker.kv.announced_moves import AnnouncedMoves
from lingualinked.worker.kv.kv_mover import KVMover
from lingualinked.worker.measuring.measure import Measurer
from lingualinked.worker.measuring.probe import LinkProbes
from lingualinked.worker.measuring.vitals import Vitals
from lingualinked.worker.messaging.error_report import describe_error
from lingualinked.worker.messaging.inbox import Inbox
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.messaging.sender_check import SenderCheck, StaleMessageError
from lingualinked.worker.process.lifeline import Lifeline
from lingualinked.worker.process.limits import apply_limits, resident_bytes
from lingualinked.worker.process.logs import ForwardingHandler, forward_logs
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.stages.load_report import describe_loaded, describe_worker
from lingualinked.worker.steps.early_steps import EarlySteps
from lingualinked.worker.steps.pace import Pace
from lingualinked.worker.steps.step_runner import StepRunner
from lingualinked.worker.weights.adapters import change_adapters
from lingualinked.worker.weights.borrower import Borrower
from lingualinked.worker.weights.file_exchange import FileExchange
from lingualinked.worker.weights.lender import Lender
from lingualinked.worker.weights.tensor_reader import TensorReader

logger = logging.getLogger("lingualinked.worker")


def serve(boot: Boot, keys: KeyPair, channel: int) -> None:
    """Run a worker until the caller, who holds the other end of the socket `channel`, has ended."""
    # 1) limits first, since threads inherit their cores; then the thread that ends this process with its caller
    apply_limits(boot.threads, boot.cpus, boot.memory_bytes, boot.accelerator)
    Lifeline(channel, boot.starter_pid, boot.socket_folder)
    # 2) the mailbox, and what wakes its loop: log records, and callbacks of background jobs
    handler = forward_logs(boot.log_level)
    mailbox = ZmqMailbox(
        boot.name,
        keys,
        ipc=boot.tcp is None,
        tcp=boot.tcp,
        socket_folder=boot.socket_folder,
        shared_memory=boot.shared_memory,
        serves_gpu=boot.accelerator.startswith("cuda"),
        max_frame_bytes=boot.max_frame_bytes,
    )
    handler.on_record = mailbox.wake
    background = Background(mailbox.wake)
    # 3) the loop
    try:
        mailbox.authorise(CALLER, boot.caller_key, same_host=boot.same_host)  # it introduces the other workers later
        mailbox.connect(CALLER, boot.caller_address, boot.caller_key)
        Worker(boot, mailbox, handler, background).run()
    finally:
        background.stop()
        mailbox.close()


class Worker:
    """Handles the messages of one mailbox, which is connected to the caller.

    `handler` collects the log records to send to the caller; `background` is the thread in which stages are loaded.
    """

    def __init__(self, boot: Boot, mailbox: Mailbox, handler: ForwardingHandler, background: Background) -> None:
        self._boot = boot
        self._mailbox = mailbox
        self._log_handler = handler
        self._background = background
        self._stages = HostedStages(boot.accelerator, self._background)
        self._peers = Peers(mailbox)
        self._moves = AnnouncedMoves()
        self._mover = KVMover(self._stages, self._peers, self._moves)
        self._lender = Lender(self._stages, self._moves)
        self._reader = TensorReader(self._stages, mailbox)
        self._borrower = Borrower(boot.name, self._stages, self._lender, self._peers)
        self._idle_resident_bytes = resident_bytes()
        self._vitals = Vitals(boot.accelerator, boot.memory_bytes)
        self._probes = LinkProbes(self._peers)
        self._files = FileExchange.open(boot.weight_folders, self._peers, background)
        check = SenderCheck(self._peers, self._stages, self._mover, self._moves, self._probes, self._files)
        self._inbox = Inbox(mailbox, check.check_sender)
        self._pace = Pace(boot.threads, 1.0)
        self._steps = StepRunner(mailbox, self._peers, self._stages, self._pace, boot.accelerator)
        self._early = EarlySteps(self._stages, lambda *first: self._steps.serve_steps(first, self._inbox.take_others))
        self._backward = BackwardRunner(mailbox, self._stages, boot.accelerator)
        self._emulate(boot.emulation)

    def run(self) -> NoReturn:
        """Send `Hello`, then handle messages until the lifeline ends the process, or UnreachableError: the caller is."""
        self._peers.await_caller(self._boot.caller_address)
        environment = read_environment(self._boot.accelerator)
        self._send_to_caller(Hello(pid=os.getpid(), address=self._mailbox.address, environment=environment))
        while True:
            self._peers.connections.decide()  # before the wait, which ends once what is not yet connected is
            waiting = self._inbox.next_message(self._peers.connections.time_left())
            if waiting is not None:
                message, delivery = waiting
                try:
                    self._handle(message, delivery)
                except Exception as error:  # noqa: BLE001 - only this message is lost
                    self._inbox.refuse(delivery, error, type(message).__name__)
            self._background.run_callbacks()
            for level, name, text in self._log_handler.drain():
                self._send_to_caller(LogRecord(level=level, logger=name, text=text))

    def _handle(self, message: CallerMessage | PeerMessage, delivery: Delivery) -> None:
        if type(message) is Step:  # most are, and each check takes time
            self._early.receive(message, delivery)
            return
        if isinstance(message, MovingMessage):
            self._handle_moving(message, delivery)
            return
        if isinstance(message, PackedStep | HookAnswered | EndSession | ShortcutTensors | RunMessage | BackwardMessage):
            self._handle_step(message, delivery)
            return
        if isinstance(message, WeightMessage):
            self._files.handle(message, delivery)
            return
        match message:
            case LoadStage():
                self._load_stage(message)
            case UnloadModel():
                self._drop_moves(message.model)
                self._steps.abandon_steps(message.model)
                self._backward.abandon_model(message.model)
                self._stages.unload_model(message.model)
                self._refuse_lost(message.model)
            case DismissWorker():
                self._peers.dismiss(message)
            case Ping() | Pong():
                self._probes.receive(message, delivery.sender, self._send_to_caller)
            case _:
                self._handle_request(message, delivery)

    def _handle_request(self, message: CallerMessage | PeerMessage, delivery: Delivery) -> None:
        match message:
            case InspectWorker():
                self._answer_request(message.request, lambda: self._make_report(message))
            case PingWorker():
                self._acknowledge(message.request, lambda: None)
            case EmulateDevice() | CutLinks():
                self._acknowledge(message.request, lambda: self._pretend(message))
            case IntroduceWorker():
                self._acknowledge(message.request, lambda: self._peers.introduce(message))
            case ConnectPeer() | ListenOverNetwork():
                self._answer_request(
                    message.request, lambda: self._peers.prepare_network(message, self._send_to_caller)
                )
            case MeasureModel():
                self._answer_request(message.request, lambda: self._measure_model(message))
            case ProbeLink():
                self._answer_request(message.request, lambda: self._probes.start_probe(message))
            case FindFiles():
                self._files.find_files(message, self._send_to_caller)
            case ShareFiles():
                self._acknowledge(message.request, lambda: self._files.share(message))
            case ReadTensor() | EditTensor():
                self._handle_tensor(message, delivery)
            case AddAdapter() | RemoveAdapter():
                self._acknowledge(message.request, lambda: change_adapters(self._stages, message, delivery.tensors))

    def _handle_step(
        self,
        message: PackedStep | HookAnswered | EndSession | ShortcutTensors | RunMessage | BackwardMessage,
        delivery: Delivery,
    ) -> None:
        match message:
            case PackedStep():
                self._steps.packed.receive_step(message, delivery)
            case HookAnswered():
                self._steps.resume_step(message, delivery.tensors)
            case EndSession():
                self._end_session(message)
            case ShortcutTensors():
                self._early.receive_shortcuts(message, delivery.tensors)
            case BeginRun() | EndRun():
                self._steps.handle_run(message, delivery.tensors)
            case RunBackward():
                self._backward.run(message, delivery.tensors)
            case ResumeBackward():
                self._backward.resume(message, delivery.tensors)
            case AbandonBackward():
                self._backward.abandon(message)
            case FreeGraph():
                self._backward.free_graph(message)

    def _handle_moving(self, message: MovingMessage, delivery: Delivery) -> None:
        match message:
            case FetchWeight():
                self._peers.send(delivery.sender, *self._lender.lend_part(message, delivery.sender))
            case WeightChunk():
                self._borrower.receive_chunk(message, delivery.sender, delivery.tensors)
            case AnnounceMove():
                self._drop_moves(message.model)
                self._moves.announce(message)
                self._send_to_caller(Acknowledged(request=message.request))
            case CopyKV():
                self._answer_request(message.request, lambda: self._mover.start_copy(message))
            case KVChunk():
                self._receive_kv(message, delivery)
            case KVReceived():
                self._answer_request(message.request, lambda: self._mover.handle_answer(message))
            case MoveSession():
                self._move_session(message)
            case ForkSession() | JoinSessions():
                self._acknowledge(message.request, lambda: self._stages.make_session(message))
            case KeepPlan():
                self._drop_moves(message.model)
                self._stages.keep_plan(message.model, message.plan_version)
                self._refuse_lost(message.model)

    def _answer_request(self, request: int, serve_request: Callable[[], WorkerMessage | None]) -> None:
        """Send the caller the answer to a request, or its failure; another party may have to answer instead."""
        try:
            answer = serve_request()
        except Exception as error:  # noqa: BLE001 - the caller re-raises it
            self._report_failure(request, error)
            return
        if answer is not None:
            self._send_to_caller(answer)

    def _acknowledge(self, request: int, do: Callable[[], None]) -> None:
        def acknowledged() -> Acknowledged:
            do()
            return Acknowledged(request=request)

        self._answer_request(request, acknowledged)

    def _report_failure(self, request: int, error: Exception) -> None:
        self._send_to_caller(RequestFailed(request=request, **describe_error(error)))

    def _load_stage(self, message: LoadStage) -> None:
        def progress(num_bytes: int) -> None:
            self._send_to_caller(Progress(request=message.request, num_done=num_bytes))

        def loaded(stage: Stage) -> None:
            self._send_to_caller(describe_loaded(message.request, stage, self._boot.accelerator, message.spec))

        def request_part(holder: WeightHolder, parameter: str, first: int) -> None:
            self._borrower.request_part(message.request, holder, parameter, first)

        self._stages.load_stage(
            message,
            progress,
            loaded,
            lambda error: self._report_failure(message.request, error),
            request_part,
            self._files.files_of(message),
        )

    def _drop_moves(self, model: int) -> None:
        """End all transfers of a model that moves, and refuse the steps that wait for its sessions to move."""
        for part in (self._moves, self._mover, self._lender, self._borrower, self._reader, self._steps.packed):
            part.drop_model(model)
        self._refuse_lost(model)

    def _refuse_lost(self, model: int) -> None:
        """Refuse the steps that wait for a session of a model to move to a stage, which it does no more."""
        for step, delivery in list(self._early.remove_lost(model)):
            why = f"a step arrived of session {step.session}, which has not moved to the step's plan version"
            self._inbox.refuse(delivery, StaleMessageError(why), "Step")

    def _move_session(self, message: MoveSession) -> None:
        try:
            self._stages.move_session(message.model, message.session, message.plan_version)
        except ProtocolError as error:  # it ended while it moved; otherwise its next step fails
            logger.debug("session %d was not moved: %s", message.session, error)
        self._early.serve_due(message.model, message.plan_version, message.session)
        self._steps.packed.run_due()

    def _receive_kv(self, message: KVChunk, delivery: Delivery) -> None:
        accepted = True
        try:
            copied = self._mover.receive_chunk(message, delivery.sender, delivery.tensors)
        except Exception as error:  # noqa: BLE001 - the caller re-raises it
            accepted = False
            self._send_to_caller(KVRefused(request=message.request, model=message.model, **describe_error(error)))
        else:
            if copied is not None:
                self._send_to_caller(copied)
        if not message.is_last:
            self._peers.send(delivery.sender, KVReceived(request=message.request, accepted=accepted))

    def _handle_tensor(self, message: ReadTensor | EditTensor, delivery: Delivery) -> None:
        if isinstance(message, ReadTensor):
            self._answer_request(message.request, lambda: self._reader.send_part(message))
            return
        self._reader.drop_model(message.model)  # a read that was interrupted may have left an unpacked weight
        self._acknowledge(message.request, lambda: self._stages.edit_tensor(message, delivery.tensors))

    def _make_report(self, message: InspectWorker) -> WorkerReport:
        return WorkerReport(
            request=message.request,
            worker=describe_worker(self._boot.name, self._idle_resident_bytes, self._mailbox.num_refused),
            device=self._vitals.read_vitals(self._stages.held_bytes()),
            stages=self._stages.reports(),
        )

    def _pretend(self, message: EmulateDevice | CutLinks) -> None:
        if isinstance(message, EmulateDevice):
            self._emulate(message.emulation)
        else:
            self._inbox.cut_links(message.senders)

    def _emulate(self, emulation: Emulation) -> None:
        self._pace.slowdown = emulation.slowdown
        self._mailbox.expect_delays(emulation.delayed_from)
        for link in emulation.links:
            bandwidth = math.inf if link.bandwidth_bytes_per_s is None else link.bandwidth_bytes_per_s
            self._mailbox.shape_link(link.target, bandwidth, link.latency_s)

    def _measure_model(self, message: MeasureModel) -> ModelMeasured:
        def progress(num_done: int) -> None:
            self._send_to_caller(Progress(request=message.request, num_done=num_done))

        self._stages.drop_idle_caches()
        return Measurer(message, self._boot.accelerator, self._pace, progress).run()

    def _end_session(self, message: EndSession) -> None:
        self._steps.abandon_steps(message.model, message.session)
        self._stages.end_session(message.model, message.session, message.plan_version)
        self._early.drop_session(message.model, message.plan_version, message.session)
        try:
            hosted = self._stages.get_stage(StageKey(message.model, message.plan_version, message.stage))
        except ProtocolError:
            return  # the model was unloaded, with the session's KV
        if not hosted.stage.is_last:
            self._peers.send(hosted.next_name, msgspec.structs.replace(message, stage=message.stage + 1))

    def _send_to_caller(self, message: WorkerMessage) -> None:
        self._mailbox.send(CALLER, encode(message))

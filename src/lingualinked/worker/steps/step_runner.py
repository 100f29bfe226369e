"""Runs steps on the stages of a worker, and sends their results on.

Knows messages, stages and where results go; not who may send what.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.model.hooks.hook_data import HookPoint, HookValue
from lingualinked.model.hooks.hook_points import ModuleCall
from lingualinked.model.stages.autograd_graph import AutogradGraph
from lingualinked.model.stages.stage_data import StageOutput
from lingualinked.model.tensor_strides import pack_tensor, unpack_tensor
from lingualinked.protocol.failures import StepFailed
from lingualinked.protocol.hooking import HookAnswered, HookReached
from lingualinked.protocol.messages import encode
from lingualinked.protocol.running import BeginRun, EndRun
from lingualinked.protocol.steps import ShortcutTensors, StageTimes, Step, StepDone, StepRecorded
from lingualinked.quantities import count_text
from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.wire.delivery import Delivery
from lingualinked.transport.wire.hop_clock import HopClock, clock_us
from lingualinked.worker.hooks.cut_calls import apply_cut, describe_cut
from lingualinked.worker.hooks.hook_graph import given_with_gradients, join_graph
from lingualinked.worker.hooks.paused_steps import PausedSteps
from lingualinked.worker.messaging.error_report import ErrorReport, describe_error
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey
from lingualinked.worker.steps.failed_steps import run_or_report
from lingualinked.worker.steps.group_runner import GroupRunner, TakeOthers
from lingualinked.worker.steps.pace import Pace
from lingualinked.worker.steps.packed_runner import PackedRunner
from lingualinked.worker.steps.runs import Runs
from lingualinked.worker.steps.step_tensors import pass_on, split_tensors
from lingualinked.worker.steps.token_sender import ChosenStep, TokenSender

_MOST_STACKED_BYTES = 1 << 20


class StepRunner:
    """Runs one step after another; one that stops at hooked modules lets others run meanwhile."""

    def __init__(self, mailbox: Mailbox, peers: Peers, stages: HostedStages, pace: Pace, accelerator: str) -> None:
        self._mailbox = mailbox
        self._peers = peers
        self._stages = stages
        self._pace = pace
        self._accelerator = accelerator
        self._paused = PausedSteps()
        self.packed = PackedRunner(mailbox, peers, stages, pace, accelerator)
        self._runs = Runs()
        self._hops = HopClock()
        self._tokens = TokenSender(mailbox, peers, self._runs)
        self._groups = GroupRunner(mailbox, peers, stages, pace, self._runs, self._hops, self._run_or_report)
        self._last_encode_us = 0

    def serve_steps(self, first: tuple[Step, Delivery], take_others: TakeOthers) -> None:
        """Run a step, together with those that wait and can run in one pass with it; send their results on."""
        group = self._groups.gather(first, take_others)
        if len(group) == 1:
            self.serve_step(*first)
        else:
            self._groups.serve(group)

    def serve_step(self, step: Step, delivery: Delivery) -> None:
        """Run a step and send its results on, or tell the caller why it failed."""
        if not step.hooks:
            self._serve_step(step, delivery, None)
            return
        key = (step.model, step.plan_version, step.session)
        try:
            self._paused.check_room(key)
        except ProtocolError as error:
            self._report_failure(step, describe_error(error))
            return
        self._paused.start_step(key, lambda wait: self._serve_step(step, delivery, wait))

    def handle_run(self, message: BeginRun | EndRun, tensors: tuple[Tensor, ...]) -> None:
        """Begin a run, and run its first step if that was here before it; or end a run. Who asked is told why none can begin."""
        if isinstance(message, EndRun):
            self._runs.end(message)
            return
        try:
            early = self._runs.begin(message, tensors)
        except Exception as error:  # noqa: BLE001 - the caller re-raises it
            self._report_failure(message, describe_error(error))
            return
        if early is not None:
            self.serve_step(*early)

    def resume_step(self, answer: HookAnswered, tensors: tuple[Tensor, ...]) -> None:
        """Go on with a step whose hooks have run, or end it."""
        if answer.goes_on:
            self._paused.resume_step((answer.model, answer.plan_version, answer.session), (answer, tensors))
        else:
            self.abandon_steps(answer.model, answer.session)

    def abandon_steps(self, model: int, session: int | None = None) -> None:
        """End the runs of a session, or of all sessions of a model, and the steps that wait for hooks."""
        self._paused.abandon_steps(model, session)
        self._runs.drop(model, session)

    def _serve_step(self, step: Step, delivery: Delivery, wait: Callable[[], Any] | None) -> None:
        self._run_or_report(functools.partial(self._run_step, step, delivery, wait), (step,))

    def _run_or_report(self, run: Callable[[], None], steps: Iterable[Step]) -> bool:
        def report(failure: ErrorReport) -> None:
            for step in steps:
                self._report_failure(step, failure)

        return run_or_report(run, report, self._stages, self._accelerator)

    def _report_failure(self, step: Step | BeginRun, failure: ErrorReport) -> None:
        failed = StepFailed(model=step.model, session=step.session, number=step.number, **failure)
        self._mailbox.send(CALLER, encode(failed))

    def _run_step(self, step: Step, delivery: Delivery, wait: Callable[[], Any] | None) -> None:
        # 1) how long the step travelled and waited
        hop_us, wait_us = self._hops.split_delay(
            delivery.sender, step.sent_us, delivery.due_s, delivery.decode_s, same_host=delivery.same_host
        )
        # 2) run it, unless its run is still to begin
        hosted = self._stages.get_stage(StageKey(step.model, step.plan_version, step.stage))
        run = self._runs.find(step) if hosted.stage.is_last else None
        if step.runner and run is None and hosted.stage.is_last and hosted.is_next(step):
            self._runs.keep_early(step, delivery)
            return
        if step.number == 0:
            self._stages.trim_idle_caches()
        hooks = step.hooks

        def pause(call: ModuleCall, graph: AutogradGraph | None) -> tuple[HookPoint, ...] | None:
            nonlocal hooks
            assert wait is not None
            first = len(call.values.tensors)
            reached, items = describe_call(step, call, graph)
            hosted.sent_bytes += self._mailbox.send(CALLER, encode(reached), items)
            answer, tensors = wait()
            if graph is None or not (answer.requires_grad or given_with_gradients(reached, first)):
                apply_answer(answer, tensors, call)
            else:
                apply_answer(answer, tensors, call, functools.partial(join_graph, reached, first, graph=graph))
            hooks = hooks if answer.points is None else answer.points
            return answer.points  # type: ignore[no-any-return]

        output, elapsed_s = hosted.run_step(step, delivery.tensors, self._pace, pause)
        if run is not None:
            started = self._pace.start_timer()
            tokens = run.choose(output.tensors[0])
            elapsed_s += self._pace.finish_timer(started)
        # 3) add this stage's times to the step's header
        # This message is not encoded yet: of the two before, the quicker one counts. A prompt takes longer than a token, and
        # a message that seems to be sent later than it is would seem to arrive before it was sent.
        last_us = round(self._mailbox.encode_s * 1e6)
        encode_us, self._last_encode_us = min(last_us, self._last_encode_us), last_us
        times = StageTimes(
            received_bytes=delivery.num_bytes,
            hop_us=hop_us,
            wait_us=wait_us,
            compute_us=round(elapsed_s * 1e6),
            codec_us=round(delivery.decode_s * 1e6) + encode_us,
        )
        timings = (*step.timings, times)
        # 4) send tokens or logits to the caller, or hidden states to the next stage
        if run is not None:
            chosen = ChosenStep(step, run, tokens, output.tensors[0], timings)
            hosted.sent_bytes += self._tokens.send([chosen], clock_us() + self._last_encode_us)
        elif hosted.stage.is_last:
            done = StepDone(
                model=step.model,
                session=step.session,
                number=step.number,
                timings=timings,
                requires_grad=any(output.requires_grad or ()),
                ends_at_tap=step.ends_at_tap,
            )
            hosted.sent_bytes += self._mailbox.send(CALLER, encode(done), output.tensors)
        else:
            self._send_shortcuts(step, hosted, output.shortcuts)
            states, strides = pack_tensor(output.tensors[0])
            onward, shared = pass_on(step, split_tensors(step, delivery.tensors)[1])
            onward = msgspec.structs.replace(
                onward,
                stage=step.stage + 1,
                layout=output.layout,
                shape=output.shape,
                strides=strides,
                timings=timings,
                sent_us=clock_us() + encode_us,
                hooks=hooks,
                requires_grad=output.requires_grad,
                ends_at_tap=() if output.requires_grad is None else (*step.ends_at_tap, output.ends_at_tap),
            )
            hosted.sent_bytes += self._peers.send(hosted.next_name, onward, (states, *output.tensors[1:], *shared))
        # 5) send the caller what was recorded and captured, while the next stage computes
        if step.records or step.captures:
            recorded, records = describe_recorded(step, output)
            hosted.sent_bytes += self._mailbox.send(CALLER, encode(recorded), records)

    def _send_shortcuts(self, step: Step, hosted: HostedStage, made: Mapping[str, Tensor]) -> None:
        """Send each later stage what this one has made for it."""
        for target in hosted.shortcut_targets:
            names = tuple(name for name in target.shortcuts if name in made)
            message = ShortcutTensors(
                model=step.model,
                plan_version=step.plan_version,
                stage=target.stage,
                source=step.stage,
                session=step.session,
                number=step.number,
                names=names,
            )
            hosted.sent_bytes += self._peers.send(target.name, message, [made[name].cpu() for name in names])


def describe_recorded(step: Step, output: StageOutput) -> tuple[StepRecorded, tuple[Tensor, ...]]:
    """Return the message for the caller with what a stage recorded, and its tensors."""
    items = [output.recorded[name] for name in step.records]
    captured = tuple(tensor for _, tensor in output.captured)
    # Each tensor of a message is described and copied on its own, which costs more than copying a small one.
    is_alike = len({(tensor.shape, tensor.dtype) for tensor in captured}) == 1 < len(captured)
    is_stacked = is_alike and sum(tensor.nbytes for tensor in captured) <= _MOST_STACKED_BYTES
    message = StepRecorded(
        model=step.model,
        session=step.session,
        number=step.number,
        stage=step.stage,
        layouts=tuple(tuple(item is not None for item in each) for each in items),
        captured=tuple(number for number, _ in output.captured),
        is_stacked=is_stacked,
    )
    recorded = tuple(item for each in items for item in each if item is not None)
    return message, (*recorded, torch.stack(captured)) if is_stacked else (*recorded, *captured)


def describe_call(
    step: Step, call: ModuleCall, graph: AutogradGraph | None = None
) -> tuple[HookReached, tuple[Tensor, ...]]:
    """Return the message for the caller about a call of a hooked module, and its tensors."""
    values, num_known = call.values, len(call.values.tensors)
    args: HookValue | None
    kwargs: HookValue | None
    output: HookValue | None
    if call.cut is not None:
        args, output = describe_cut(call)
        kwargs = None
    else:
        args, kwargs, output = (
            values.describe(value, values.objects.append) if is_sent else None
            for value, is_sent in (
                (call.args, call.sends_inputs),
                (call.kwargs, call.sends_inputs),
                (call.output, call.is_done),
            )
        )
    packed = [pack_tensor(tensor.cpu()) for tensor in values.tensors[num_known:]]
    message = HookReached(
        model=step.model,
        session=step.session,
        number=step.number,
        stage=step.stage,
        path=call.path,
        is_done=call.is_done,
        args=args,
        kwargs=kwargs,
        output=output,
        strides=tuple(strides for _, strides in packed),
        is_cut=call.cut is not None,
        requires_grad=() if graph is None else tuple(each.requires_grad for each in values.tensors[num_known:]),
        held=() if graph is None else tuple(map(graph.find_held, values.tensors[num_known:])),
    )
    return message, tuple(tensor for tensor, _ in packed)


def apply_answer(
    answer: HookAnswered, tensors: tuple[Tensor, ...], call: ModuleCall, join: Callable[..., HookAnswered] | None = None
) -> None:
    """Put what hooks have made of a call in its place; raise ProtocolError if it does not fit the call.

    In a step with gradients, `join` puts tensors in their places (`hook_graph.join_graph`).
    """
    values, num_changed = call.values, len(answer.changed)
    known = values.tensors
    if len(tensors) != num_changed + len(answer.strides) or any(index >= len(known) for index in answer.changed):
        raise ProtocolError(
            f"{count_text(len(tensors), 'tensor')} arrived with the answer to the hooks of {call.path!r}"
        )
    device = known[0].device if known else torch.device("cpu")
    new = [unpack_tensor(*each).to(device) for each in zip(tensors[num_changed:], answer.strides, strict=True)]
    if join is not None:
        answer = join(answer, [content.to(device) for content in tensors[:num_changed]], new, call)
    else:
        # 1) in place, since other tensors may share the memory
        for index, content in zip(answer.changed, tensors, strict=False):
            known[index].copy_(content)
        # 2) the others in place of the call's own
        known.extend(new)
    if call.cut is not None:
        apply_cut(answer, call)
        return
    if answer.args is not None:
        call.args = values.rebuild(answer.args)
    if answer.kwargs is not None:
        call.kwargs = values.rebuild(answer.kwargs)
    if answer.output is not None:
        if not call.is_done and not call.may_skip:
            raise ProtocolError(f"an output of {call.path!r} arrived before it has run")
        call.output, call.is_skipped = values.rebuild(answer.output), not call.is_done
    call.waits_for_output = answer.waits_for_output

"""Runs backward passes through the graphs that steps have left in a worker's stages.

Knows messages, graphs and stages; not who may send what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.model.process.torch_settings import torch_settings
from lingualinked.model.stages.autograd_graph import AutogradGraph, Gradients
from lingualinked.protocol.failures import RequestFailed
from lingualinked.protocol.gradients import AbandonBackward, BackwardDone, FreeGraph, ResumeBackward, RunBackward
from lingualinked.protocol.messages import encode
from lingualinked.quantities import count_text
from lingualinked.transport.mailbox import Mailbox
from lingualinked.worker.hooks.paused_steps import PausedSteps, StepKey
from lingualinked.worker.messaging.error_report import describe_error
from lingualinked.worker.process.limits import end_if_device_is_lost
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey


class BackwardRunner:
    """Runs one backward pass after another; one that waits at a tap lets others run meanwhile."""

    def __init__(self, mailbox: Mailbox, stages: HostedStages, accelerator: str) -> None:
        self._mailbox = mailbox
        self._stages = stages
        self._accelerator = accelerator
        self._paused = PausedSteps()

    def run(self, message: RunBackward, tensors: tuple[Tensor, ...]) -> None:
        """Run a backward pass, and send the gradients that it ends or stops with, or tell the caller why it failed."""
        key = _key(message)
        self._paused.abandon_step(key)  # whose caller has begun anew
        try:
            hosted, graph = self._find_graph(message)
            if graph.num_taps:
                self._paused.check_room(key)
        except Exception as error:  # noqa: BLE001 - the caller re-raises it
            self._report_failure(message.request, error)
            return
        if graph.num_taps:
            self._paused.start_step(key, lambda wait: self._run(message, tensors, hosted, graph, wait))
        else:
            self._run(message, tensors, hosted, graph, None)

    def resume(self, message: ResumeBackward, tensors: tuple[Tensor, ...]) -> None:
        """Go on with a backward pass that waits at a tap."""
        try:
            self._paused.resume_step(_key(message), (message, tensors))
        except ProtocolError:
            error = ArgumentError("this backward pass has ended: another one has begun, or the graph was freed")
            self._report_failure(message.request, error)

    def abandon(self, message: AbandonBackward) -> None:
        """End a backward pass that waits at a tap, if it does."""
        self._paused.abandon_step(_key(message))

    def free_graph(self, message: FreeGraph) -> None:
        """Free the graph of a step, if it is there."""
        self._paused.abandon_step(_key(message))
        with contextlib.suppress(ProtocolError):  # it was freed with its stage
            hosted = self._stages.get_stage(StageKey(message.model, message.plan_version, message.stage))
            hosted.graphs.free((message.session, message.number))

    def abandon_model(self, model: int) -> None:
        """End all backward passes of a model that wait."""
        self._paused.abandon_steps(model)

    def _find_graph(self, message: RunBackward) -> tuple[HostedStage, AutogradGraph]:
        try:
            hosted = self._stages.get_stage(StageKey(message.model, message.plan_version, message.stage))
        except ProtocolError:
            raise ArgumentError(
                "layers have moved since the forward pass, whose graph was freed with them: run the forward pass again"
            ) from None
        return hosted, hosted.graphs.find((message.session, message.number))

    def _run(
        self,
        message: RunBackward,
        tensors: tuple[Tensor, ...],
        hosted: HostedStage,
        graph: AutogradGraph,
        wait: Callable[[], Any] | None,
    ) -> None:
        request = message.request  # which is to be answered next

        def send(tap: int | None, gradients: Gradients) -> None:
            given, sent = split_gradients(gradients)
            done = BackwardDone(request=request, tap=tap, given=given)
            hosted.sent_bytes += self._mailbox.send(CALLER, encode(done), sent)

        def reach_tap(tap: int, gradients: Gradients) -> tuple[Gradients, Gradients]:
            nonlocal request
            assert wait is not None
            settings.close()
            send(tap, gradients)
            answer, arrived = wait()
            request = answer.request
            settings.enter_context(torch_settings(dict(message.torch_settings)))
            return join_gradients(answer, arrived)

        try:
            with contextlib.ExitStack() as settings:
                settings.enter_context(torch_settings(dict(message.torch_settings)))
                gradients, injected = join_gradients(message, tensors)
                found = graph.run(
                    message.tap, gradients, injected, keeps_graph=message.keeps_graph, reach_tap=reach_tap
                )
            send(None, found)
        except Exception as error:  # noqa: BLE001 - the caller re-raises it
            self._report_failure(request, error)
            end_if_device_is_lost(self._accelerator)

    def _report_failure(self, request: int, error: Exception) -> None:
        self._mailbox.send(CALLER, encode(RequestFailed(request=request, **describe_error(error))))


def _key(message: RunBackward | ResumeBackward | AbandonBackward | FreeGraph) -> StepKey:
    return message.model, message.number, message.session


def join_gradients(message: RunBackward | ResumeBackward, tensors: tuple[Tensor, ...]) -> tuple[Gradients, Gradients]:
    """Return gradients, and those to be injected, as a message lists them; raise ProtocolError if others have arrived."""
    if len(tensors) != sum(message.given) + sum(message.injected):
        raise ProtocolError(
            f"{count_text(len(tensors), 'gradient')} arrived, and {sum(message.given) + sum(message.injected)} are announced"
        )
    rest = iter(tensors)
    given, injected = (
        tuple(next(rest) if is_given else None for is_given in each) for each in (message.given, message.injected)
    )
    return given, injected


def split_gradients(gradients: Gradients) -> tuple[tuple[bool, ...], tuple[Tensor, ...]]:
    """Return which gradients there are, and these as they are sent."""
    present = tuple(each.detach().cpu().contiguous() for each in gradients if each is not None)
    return tuple(each is not None for each in gradients), present

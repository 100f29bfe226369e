"""Runs backward passes through the graphs that steps have left in a worker's stages.

Knows messages, graphs and stages; not who may send what.
"""

from __future__ import annotations

from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.model.autograd_graph import Gradients
from lingualinked.model.torch_settings import torch_settings
from lingualinked.protocol.gradients import BackwardDone, FreeGraph, RunBackward
from lingualinked.protocol.messages import encode
from lingualinked.transport.mailbox import Mailbox
from lingualinked.worker.hosted_stages import HostedStages, StageKey


class BackwardRunner:
    """Runs one backward pass after another."""

    def __init__(self, mailbox: Mailbox, stages: HostedStages) -> None:
        self._mailbox = mailbox
        self._stages = stages

    def run(self, message: RunBackward, tensors: tuple[Tensor, ...]) -> None:
        """Run a backward pass, and send the gradients of the stage's inputs; raise if that is not possible.

        Raises ArgumentError if the graph has been freed, and ProtocolError if the gradients are not those of its outputs.
        """
        try:
            hosted = self._stages.get_stage(StageKey(message.model, message.plan_version, message.stage))
        except ProtocolError:
            raise ArgumentError(
                "its layers have moved since the forward pass, whose graph was freed: run the forward pass again"
            ) from None
        graph = hosted.graphs.find((message.session, message.number))
        gradients = join_gradients(message.given, tensors)
        with torch_settings(dict(message.torch_settings)):
            found = graph.run(gradients, keeps_graph=message.keeps_graph)
        given, sent = split_gradients(found)
        hosted.sent_bytes += self._mailbox.send(
            CALLER, encode(BackwardDone(request=message.request, given=given)), sent
        )

    def free_graph(self, message: FreeGraph) -> None:
        """Free the graph of a step, if it is there."""
        try:
            hosted = self._stages.get_stage(StageKey(message.model, message.plan_version, message.stage))
        except ProtocolError:
            return  # the graph was freed with its stage
        hosted.graphs.free((message.session, message.number))


def join_gradients(given: tuple[bool, ...], tensors: tuple[Tensor, ...]) -> Gradients:
    """Return gradients as they are listed, from those that have arrived; raise ProtocolError if their number differs."""
    if len(tensors) != sum(given):
        raise ProtocolError(f"{len(tensors)} gradients arrived, and {sum(given)} are announced")
    rest = iter(tensors)
    return tuple(next(rest) if is_given else None for is_given in given)


def split_gradients(gradients: Gradients) -> tuple[tuple[bool, ...], tuple[Tensor, ...]]:
    """Return which gradients there are, and these as they are sent."""
    present = tuple(each.cpu().contiguous() for each in gradients if each is not None)
    return tuple(each is not None for each in gradients), present

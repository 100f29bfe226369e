"""Steps of several sessions that go the same way at the same time, as one message.

Knows messages and their tensors; no stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.steps import Step, StepGroup
from lingualinked.quantities import count_text
from lingualinked.transport.wire.delivery import Delivery


def split_group(group: StepGroup, delivery: Delivery) -> Iterator[tuple[Step, Delivery]]:
    """Yield the steps of a group, each as it would have been received alone; raise ProtocolError if its tensor does not fit."""
    number, tensors = len(group.steps), delivery.tensors
    if not number or len(tensors) != 1 or tensors[0].ndim < 2 or len(tensors[0]) != number:
        raise ProtocolError(
            f"a group of {count_text(number, 'step')} arrived with the tensors {[list(each.shape) for each in tensors[:9]]}"
        )
    num_bytes, decode_s = delivery.num_bytes // number, delivery.decode_s / number
    for step, own in zip(group.steps, tensors[0].split(1), strict=True):
        yield step, dataclasses.replace(delivery, tensors=(own,), num_bytes=num_bytes, decode_s=decode_s)


def join_steps(steps: Sequence[tuple[Step, Tensor]]) -> tuple[Step | StepGroup, Tensor]:
    """Return the message for steps that go the same way, and its tensor: a step's own if there is only one."""
    if len(steps) == 1:
        return steps[0]
    return StepGroup(steps=tuple(step for step, _ in steps)), torch.cat([tensor for _, tensor in steps])

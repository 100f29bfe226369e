"""The messages by which the caller reads tensors that stages hold, as msgspec structs.

Knows neither why they are read nor how. Tensors are sent with a message, never in it.
"""

from __future__ import annotations

from lingualinked.protocol.base import Message, Natural


class ReadTensor(Message, frozen=True, tag=43):
    """Send a part of a parameter or buffer of stage ``stage``, from element ``first`` on.

    Requests are repeated until the last element has arrived: a step waits for one part at most.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    name: str
    first: Natural


class TensorRead(Message, frozen=True, tag=44):
    """Answer to `ReadTensor`: the elements are sent with it, flat; none if the stage is no longer hosted there."""

    request: int

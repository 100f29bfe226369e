"""The messages of backward passes: the caller has a stage run one through its part of a step's graph.

Knows no graphs. Gradients are sent with a message, never in it; those of tensors that nothing depends on are left out.
"""

from __future__ import annotations

from lingualinked.protocol.base import Message


class RunBackward(Message, frozen=True, tag=55):
    """Run a backward pass through the graph of a step on stage ``stage``, from its outputs to its inputs.

    ``given`` says of which outputs gradients are sent with the message. The graph serves another pass afterwards if it is
    kept (``keeps_graph``). Stages compute under ``torch_settings`` (see `lingualinked.protocol.steps.Step`).
    """

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    number: int
    given: tuple[bool, ...]
    keeps_graph: bool
    torch_settings: tuple[tuple[str, bool | int | str], ...] = ()


class BackwardDone(Message, frozen=True, tag=57):
    """Answer to `RunBackward`: ``given`` says of which of the stage's inputs gradients are sent with it."""

    request: int
    given: tuple[bool, ...]


class FreeGraph(Message, frozen=True, tag=58):
    """Free the graph of a step on stage ``stage``; there is no answer."""

    model: int
    plan_version: int
    stage: int
    session: int
    number: int

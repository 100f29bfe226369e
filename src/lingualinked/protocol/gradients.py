"""The messages of backward passes: the caller has a stage run one through its part of a step's graph.

Knows no graphs. Gradients are sent with a message, never in it; those of tensors that nothing depends on are left out.
"""

from __future__ import annotations

from lingualinked.protocol.base import Message, Natural


class RunBackward(Message, frozen=True, tag=55):
    """Run a backward pass through the graph of a step on stage ``stage``, from its outputs to its inputs.

    With a ``tap``, it begins there: where hooks have run, which are numbered in each stage, with what they were given.
    ``given`` says of which outputs, or of which tensors there, gradients are sent with the message; ``injected`` says the same of
    what the hooks of the tap before have returned: these gradients are to come before those through the stage. The graph serves another pass afterwards if it is
    kept (``keeps_graph``). Stages compute under ``torch_settings`` (see `lingualinked.protocol.steps.Step`).
    """

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    number: int
    tap: Natural | None
    given: tuple[bool, ...]
    injected: tuple[bool, ...]
    keeps_graph: bool
    torch_settings: tuple[tuple[str, bool | int | str], ...] = ()


class ResumeBackward(Message, frozen=True, tag=56):
    """Go on with a backward pass that waits at a tap: ``given`` says of which tensors that its hooks were given gradients come.

    ``injected`` is as in `RunBackward`.
    """

    request: int
    model: int
    plan_version: int
    stage: int
    session: int
    number: int
    given: tuple[bool, ...]
    injected: tuple[bool, ...]


class BackwardDone(Message, frozen=True, tag=57):
    """Answer to `RunBackward` and `ResumeBackward`: ``given`` says of which of the stage's inputs gradients are sent with it.

    If the pass waits at a ``tap``, these are gradients of what its hooks have returned.
    """

    request: int
    tap: Natural | None
    given: tuple[bool, ...]


class AbandonBackward(Message, frozen=True, tag=59):
    """End a backward pass that waits at a tap on stage ``stage``; there is no answer."""

    model: int
    plan_version: int
    stage: int
    session: int
    number: int


class FreeGraph(Message, frozen=True, tag=58):
    """Free the graph of a step on stage ``stage``; there is no answer."""

    model: int
    plan_version: int
    stage: int
    session: int
    number: int


BackwardMessage = RunBackward | ResumeBackward | AbandonBackward | FreeGraph
"""The messages of backward passes to a worker."""

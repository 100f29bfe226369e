"""The messages of a step that stops at hooked modules: what a module was called with, and what its hooks have made of it.

Knows descriptions of structures; their tensors travel beside the messages. No functions travel.
"""

from __future__ import annotations

from lingualinked.model.hooks.hook_data import HookPoint, HookValue, Strides
from lingualinked.protocol.base import Message, Natural


class HookReached(Message, frozen=True, tag=36):
    """A step has reached a hooked module on stage ``stage`` and waits for `HookAnswered`.

    ``args`` and ``kwargs`` are None if the caller knows them from this call's first message. ``strides`` are those of the
    tensors beside the message, which are the call's next ones. If hooks want only a part of the call (``is_cut``), ``output``
    is the tensor that they may replace, before the module too, and ``args`` the one that they may read, if they want it.
    In a step with gradients, ``requires_grad`` says which of the tensors beside the message have them, and ``held`` which are the
    same as tensors with gradients that hooks have returned before in this stage, by their number; -1 is the last one of the stage
    before; in the first stage, the step's inputs.
    """

    model: int
    session: int
    number: int
    stage: int
    path: str
    is_done: bool
    args: HookValue | None
    kwargs: HookValue | None
    output: HookValue | None
    strides: tuple[Strides, ...]
    is_cut: bool = False
    requires_grad: tuple[bool, ...] = ()
    held: tuple[int | None, ...] = ()


class HookAnswered(Message, frozen=True, tag=37):
    """What hooks have made of a call: it goes on with it, or ends the step (``goes_on``).

    Of the tensors beside it, the first are the new contents of those with the indices ``changed``, and the others the call's
    next ones. What is None stays as it was; an ``output`` before the module has run takes the place of running it. ``points``
    are the hooked modules from now on, if they have changed.
    ``requires_grad`` are the indices of the tensors that have gradients now, of those that the last message has added, and that
    hooks have changed or returned.
    """

    model: int
    plan_version: int
    stage: int
    session: int
    number: int
    goes_on: bool
    waits_for_output: bool = False
    changed: tuple[Natural, ...] = ()
    args: HookValue | None = None
    kwargs: HookValue | None = None
    output: HookValue | None = None
    strides: tuple[Strides, ...] = ()
    points: tuple[HookPoint, ...] | None = None
    requires_grad: tuple[Natural, ...] = ()

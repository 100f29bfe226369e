"""Calls of modules whose hooks want only a part of them: what is sent, and what becomes of the call.

Knows a call and its message; neither sockets nor stages.
"""

from __future__ import annotations

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.hooks.hook_cuts import (
    cut_tensor,
    first_input,
    first_tensor,
    put_tensor,
    with_first_input,
    with_first_tensor,
)
from lingualinked.model.hooks.hook_data import HookValue
from lingualinked.model.hooks.hook_points import ModuleCall
from lingualinked.protocol.hooking import HookAnswered


def describe_cut(call: ModuleCall) -> tuple[HookValue | None, HookValue]:
    """List the tensors that are sent; return the one that hooks may read, if they want one, and the one that they may replace."""
    assert call.cut is not None
    values, read = call.values, None
    if call.cut.with_input:
        given = cut_tensor(first_input(call.args, call.kwargs), call.cut.positions)
        read = values.describe(given, values.objects.append)
    return read, values.describe(cut_tensor(_replaceable(call), call.cut.positions), values.objects.append)


def apply_cut(answer: HookAnswered, call: ModuleCall) -> None:
    """Put what hooks have made of the part in its place, once the call's tensors are as the answer says."""
    assert call.cut is not None
    index = len(call.values.tensors) - len(answer.strides) - 1
    positions = call.cut.positions
    if answer.output is not None:
        new = call.values.rebuild(answer.output)
    elif positions is not None and index in answer.changed:
        new = call.values.tensors[index]
    else:
        return  # as it was, or changed in place
    if not isinstance(new, Tensor):
        raise ProtocolError(f"hooks of {call.path!r} made a {type(new).__name__} of a tensor")
    new = put_tensor(_replaceable(call), positions, new)
    if call.is_done:
        call.output = with_first_tensor(call.output, new)
    else:
        call.args, call.kwargs = with_first_input(call.args, call.kwargs, new)


def _replaceable(call: ModuleCall) -> Tensor:
    """Return the tensor of a call that hooks may replace, or a part of it."""
    return first_tensor("what the module returns", call.output) if call.is_done else first_input(call.args, call.kwargs)

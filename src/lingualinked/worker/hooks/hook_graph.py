"""Puts what hooks have made of a call's tensors into the autograd graph of a step.

Knows a call, the answer to it and the graph; neither sockets nor stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.hooks.hook_points import ModuleCall
from lingualinked.model.stages.autograd_graph import AutogradGraph, Returned
from lingualinked.protocol.hooking import HookAnswered, HookReached


def given_with_gradients(reached: HookReached, first: int) -> list[int]:
    """Return which tensors with gradients hooks were given that they have not returned before, from the one numbered `first` on."""
    return [
        first + place
        for place, (has_gradient, held) in enumerate(zip(reached.requires_grad, reached.held, strict=True))
        if has_gradient and held is None
    ]


def join_graph(
    reached: HookReached,
    first: int,
    answer: HookAnswered,
    contents: Sequence[Tensor],
    new: Sequence[Tensor],
    call: ModuleCall,
    *,
    graph: AutogradGraph,
) -> HookAnswered:
    """Put what hooks have made of a call's tensors in their places, as part of the graph; return the answer as it then reads.

    `contents` are those of the tensors that have been changed, and `new` the tensors that hooks have added.
    """
    # 1) which tensors they were given, from the one numbered `first` on, and which have gradients now
    known = call.values.tensors
    changed = dict(zip(answer.changed, contents, strict=True))
    given = given_with_gradients(reached, first)
    asked = answer.requires_grad
    if len(set(asked)) < len(asked) or any(
        each >= len(known) + len(new)
        or (each < len(known) and each not in changed and (each < first or reached.held[each - first] is not None))
        for each in asked
    ):
        raise ProtocolError(f"the hooks of {call.path!r} gave gradients to tensors {asked}, which they can't have")
    others = [index for index in asked if index < len(known) and index not in given]
    places = {index: place for place, index in enumerate((*given, *others))}
    returned = [
        Returned(
            places.get(index),
            changed.get(index) if index < len(known) else new[index - len(known)],
            is_view=index < len(known) and known[index]._is_view(),  # noqa: SLF001 - no public method
        )
        for index in asked
    ]
    # 2) those without gradients as in any other step, and the others by a tap of the graph
    for index, content in changed.items():
        if index not in asked:
            if known[index].requires_grad:
                raise ProtocolError(f"the hooks of {call.path!r} took the gradient of tensor {index} away")
            known[index].copy_(content)
    results = graph.pass_hooks([known[each] for each in given], [known[each] for each in others], returned)
    known.extend(new)
    is_replaced = any(
        index < len(known) - len(new) and known[index] is not result
        for index, result in zip(asked, results, strict=True)
    )
    for index, result in zip(asked, results, strict=True):
        known[index] = result
    # 3) the call refers to other objects, if these have been replaced
    if not is_replaced:
        return answer
    before = {"args": reached.args, "kwargs": reached.kwargs, "output": reached.output}
    if call.cut is not None:
        before = {"output": reached.output}
    kept = {name: value for name, value in before.items() if getattr(answer, name) is None}
    return msgspec.structs.replace(answer, **kept)

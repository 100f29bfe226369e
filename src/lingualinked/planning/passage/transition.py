"""From plan to plan within memory: the plans to go through where a move at once would exceed a device's memory.

Knows plans and bytes; neither what a migration does nor how long it takes.
"""

from __future__ import annotations

import dataclasses

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.passage.holdings import Holdings, Ledger, Spans
from lingualinked.planning.passage.waves import slots_of, waves
from lingualinked.planning.plan import Plan, check_plan, complete_plan
from lingualinked.planning.plan_checks import refuse_overfull
from lingualinked.quantities import bytes_text


def transition(before: Plan, after: Plan, holdings: Holdings) -> tuple[Plan, ...]:
    r"""Find the plans to go through from one plan to another, so that each fits beside the one before; ``after`` is the last.

    While layers move from a plan :math:`P` to a plan :math:`Q`, a device holds its layers of both, those that are in both
    once, with their KV; embeddings and head if it has the first or the last stage in either; and one stage's
    intermediate results, for it computes one at a time. That must not exceed its memory; or, where it exceeds it under
    ``before`` already, not become more than that.

    Where both plans fit at once, layers move at once, in whatever order the devices stand. Else every layer moves straight
    to its new device as soon as that has room (`passage.waves.waves`), which always leads from one plan to another along
    one order of devices. Where devices change their order, or one holds both ends, they may wait for each other: then, and
    if ``after`` does not fit, an InfeasiblePlanError is raised.
    """
    names = [device.name for device in holdings.devices]
    for plan in (before, after):
        check_plan(plan, len(holdings.weights.layers), names, holdings.transmission)
    origin, target = before.spans, after.spans
    ledger = Ledger(holdings, origin)
    for device in after.devices:
        held = "weights, KV and intermediate results"
        refuse_overfull(device, ledger.held_bytes(device, target), ledger.limits[device], held)
    path = waves(origin, target, ledger)
    if path is None:
        raise _no_way(origin, target, ledger)
    stages = [Plan.from_spans(spans).stages for spans in path[:-1]]
    between = (dataclasses.replace(after, stages=each, solved=None) for each in stages)
    return (*(complete_plan(plan, holdings.weights, holdings.devices) for plan in between), after)


def _no_way(origin: Spans, target: Spans, ledger: Ledger) -> InfeasiblePlanError:
    held = {name: ledger.held_bytes(name, origin, target) for name in slots_of((*origin, *target))}
    device = max(held, key=lambda name: held[name] - ledger.limits[name])
    limit = ledger.limits[device]
    missing = int(held[device] - limit)
    shared = set(slots_of(origin)) & set(slots_of(target))
    before, after = ([name for name in dict.fromkeys(slots_of(plan)) if name in shared] for plan in (origin, target))
    keep_order = f"keep the devices in their order ({', '.join(before)}), " if before != after else ""
    return InfeasiblePlanError(
        f"the layers can't be moved within memory: while they move, device {device!r} would hold {bytes_text(held[device])} "
        f"of both plans and has {bytes_text(limit)}: {bytes_text(missing, round_up=True)} short, and if layers moved one "
        f"after the other, devices would wait for each other; raise its memory, {keep_order}or go through a plan that leaves "
        "it room",
        missing_bytes=missing,
    )

"""From plan to plan within memory: the plans to go through where a move at once would exceed a device's memory.

Knows plans and bytes; neither what a migration does nor how long it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.passage.fill import can_hold, closest_fill
from lingualinked.planning.passage.holdings import Holdings, Ledger, Spans
from lingualinked.planning.passage.orders import Orders, Relocation
from lingualinked.planning.passage.waves import merged, slots_of, wander, waves
from lingualinked.planning.plan import Plan, PlannedStage, check_plan, inexact_because
from lingualinked.quantities import bytes_text


def transition(before: Plan, after: Plan, holdings: Holdings) -> tuple[Plan, ...]:
    r"""Find the plans to go through from one plan to another, so that each fits beside the one before.

    While layers move from a plan :math:`P` to a plan :math:`Q`, a device holds its layers of both, those that are in both
    once, with their KV; embeddings and head if it has the first or the last stage in either; and one stage's
    intermediate results, for it computes one at a time. That must not exceed its memory; or, where it exceeds it under
    `before` already, not become more than that.

    Along one order of devices there is always a way, and layers go straight to their new devices in waves (see
    `passage.waves.waves`); one plan between the two is looked for first, by a dynamic programme. Where devices change
    their order, or one holds both ends, devices are emptied and put into their new place one after the other, which is
    an A\* search over orders (`passage.orders.Orders`), with devices of `after` to hold their layers meanwhile if those
    have room, else idle ones, else those that are to be left. What is found is shortened: plans that can be skipped are.
    Searches are bounded, so where order changes or a device holds both ends, a way may be missed; one that is given fits.

    Parameters
    ----------
    before, after : Plan
        Of the same model.
    holdings : Holdings
        What layers take and devices have.

    Returns
    -------
    tuple of Plan
        The plans to move to, one after the other, `after` last; only `after` if nothing is in the way. Token ids,
        logits and trusted layers stay on trusted devices under all of them, if any device is trusted; and if the devices of both plans
        round alike, layers are on such alone.

    Raises
    ------
    InfeasiblePlanError
        If `after` does not fit, or no way was found.
    """
    names = [device.name for device in holdings.devices]
    for plan in (before, after):
        check_plan(plan, len(holdings.weights.layers), names)
    allowed = _rounding_alike(holdings, {*before.devices, *after.devices})
    origin, target = _spans(before), _spans(after)
    ledger = Ledger(allowed, origin, after.trusted_layers)
    for device in after.devices:
        _refuse_overfull(device, ledger, target)
    if ledger.fit(origin, target):
        return (after,)
    path = _find(origin, target, ledger)
    if path is None:
        raise _no_way(origin, target, ledger, [name for name in names if name not in ledger.limits])
    between = _shortened([origin, *path], ledger)[1:-1]
    return (*(_plan(spans, after, holdings) for spans in between), after)


def _rounding_alike(holdings: Holdings, used: Collection[str]) -> Holdings:
    """Leave out devices that are not used anyway and on which results would be others."""
    in_use = [device for device in holdings.devices if device.name in used]
    if inexact_because(in_use):
        return holdings
    kept = [
        index
        for index, device in enumerate(holdings.devices)
        if device.name in used or not inexact_because([*in_use, device])
    ]
    return dataclasses.replace(
        holdings,
        devices=tuple(holdings.devices[index] for index in kept),
        capacity_bytes=tuple(holdings.capacity_bytes[index] for index in kept),
    )


def _find(origin: Spans, target: Spans, ledger: Ledger) -> list[Spans] | None:
    path = waves(origin, target, ledger)
    if path is not None and len(path) == 2:
        return path
    leaving = set(slots_of(origin)) - set(slots_of(target))
    through = closest_fill(_compatible(origin, target, leaving), ledger, origin, target)
    if through is not None and ledger.fit(origin, through) and ledger.fit(through, target):
        return [through, target]
    if path is None and not _changes_order(origin, target):
        path = wander(origin, target, ledger)
    if path is not None:
        return path
    idle = set(ledger.limits) - set(slots_of(origin)) - set(slots_of(target))
    closing: Collection[str] = {plan[0][0] for plan in (origin, target) if len(plan) > 1 and plan[0][0] == plan[-1][0]}
    rounds: list[tuple[list[str], Collection[str]]] = []
    for spared, may_close in (  # what is spared, and used only if it must be
        (leaving | idle, closing),
        (leaving, closing),
        (set[str](), closing),
        (set[str](), ledger.may_hold_ends),
    ):
        usable = [name for name in ledger.limits if name not in spared]
        if (usable, may_close) not in rounds:
            rounds.append((usable, may_close))
    for usable, may_close in rounds:
        path = _by_relocation(origin, target, ledger, usable, may_close)
        if path is not None:
            return path
    return wander(origin, target, ledger)


def _by_relocation(
    origin: Spans, target: Spans, ledger: Ledger, usable: Collection[str], closing: Collection[str]
) -> list[Spans] | None:
    orders = Orders(ledger, usable, closing)
    found = orders.relocations(slots_of(origin), slots_of(target))
    if found is None:
        return None
    in_order = tuple(name for name in orders.all_in_order(slots_of(origin), slots_of(target)) if name in usable)
    for goals in (_grouped(found, ledger), [each.without for each in found]) if found else ([in_order],):
        path = _through(goals, origin, target, ledger)
        if path is not None:
            return path
    return None


def _grouped(relocations: Sequence[Relocation], ledger: Ledger) -> list[tuple[str, ...]]:
    """Empty as many devices at once as the others can stand in for."""
    orders: list[tuple[str, ...]] = []
    for each in relocations:
        without = tuple(name for name in orders[-1] if name != each.device) if orders else ()
        if can_hold(without, ledger):
            orders[-1] = without
        else:
            orders.append(each.without)
    return orders


def _through(orders: Sequence[tuple[str, ...]], origin: Spans, target: Spans, ledger: Ledger) -> list[Spans] | None:
    """Go through a plan of each order."""
    path = [origin]
    for order in orders:
        goal = closest_fill(order, ledger, path[-1], target) if order else None
        part = None if goal is None else _along(path[-1], goal, ledger)
        if part is None:
            return None
        path += part
    rest = _along(path[-1], target, ledger)
    return None if rest is None else [*path[1:], *rest]


def _along(origin: Spans, target: Spans, ledger: Ledger) -> list[Spans] | None:
    return waves(origin, target, ledger) or wander(origin, target, ledger)


def _compatible(origin: Spans, target: Spans, leaving: set[str]) -> list[str]:
    """Return devices in an order that agrees with both plans."""
    slots, _, _ = merged(slots_of(origin), slots_of(target))
    is_ring = slots.count(slots[0]) == 2 and slots[0] == slots[-1]
    kept = [name for name in slots if name not in leaving and slots.count(name) == 1]
    return [slots[0], *kept, slots[0]] if is_ring and slots[0] not in leaving else kept or [target[0][0]]


def _changes_order(origin: Spans, target: Spans) -> bool:
    slots, _, _ = merged(slots_of(origin), slots_of(target))
    return any(slots.count(name) > 1 for name in slots[slots[0] == slots[-1] :])


def _shortened(path: list[Spans], ledger: Ledger) -> list[Spans]:
    """Leave out as many plans as can be left out."""
    num_steps = [0] + [len(path)] * (len(path) - 1)
    came_from = [0] * len(path)
    for index in range(len(path)):
        for later in range(index + 1, len(path)):
            if num_steps[index] + 1 < num_steps[later] and ledger.fit(path[index], path[later]):
                num_steps[later], came_from[later] = num_steps[index] + 1, index
    index, kept = len(path) - 1, [path[-1]]
    while index:
        index = came_from[index]
        kept.append(path[index])
    return kept[::-1]


def _spans(plan: Plan) -> Spans:
    return tuple((stage.device, stage.start, stage.end) for stage in plan.stages)


def _plan(spans: Spans, after: Plan, holdings: Holdings) -> Plan:
    devices = {device.name: device for device in holdings.devices}
    return Plan(
        stages=tuple(
            PlannedStage(device=device, start=start, end=end, weight_bytes=holdings.weights.of_span(start, end))
            for device, start, end in spans
        ),
        inexact_because=inexact_because([devices[name] for name in dict.fromkeys(slots_of(spans))]),
        profile=after.profile,
        workload=after.workload,
        reserve=after.reserve,
    )


def _refuse_overfull(device: str, ledger: Ledger, target: Spans) -> None:
    held, limit = ledger.held_bytes(device, target), ledger.limits[device]
    if held > limit:
        missing = int(held - limit)
        raise InfeasiblePlanError(
            f"the plan puts {bytes_text(held)} of weights, KV and intermediate results on device {device!r}, which has "
            f"{bytes_text(limit)}: {bytes_text(missing, round_up=True)} short; raise its memory or give it fewer layers",
            missing_bytes=missing,
        )


def _no_way(origin: Spans, target: Spans, ledger: Ledger, left_out: Sequence[str]) -> InfeasiblePlanError:
    held = {name: ledger.held_bytes(name, origin, target) for name in slots_of((*origin, *target))}
    device = max(held, key=lambda name: held[name] - ledger.limits[name])
    limit = ledger.limits[device]
    missing = int(held[device] - limit)
    rounding = f" (without {', '.join(map(repr, left_out))}, on which results would be others)" if left_out else ""
    return InfeasiblePlanError(
        f"no way was found from the one plan to the other: at once, device {device!r} would hold "
        f"{bytes_text(held[device])} of both and has {bytes_text(limit)}: {bytes_text(missing, round_up=True)} short, and no "
        f"plans in between were found with which every device has room{rounding}; raise its memory, add a device, keep the order "
        "of the devices, or wait for sessions to end",
        missing_bytes=missing,
    )

"""Explains a plan, by solving changed problems again: `Plan.explain`.

Knows profiles, plans and the solver; nothing of how a text is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lingualinked.device import CALLER
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.explanation import Explanation, WhatIf
from lingualinked.planning.plan import Plan
from lingualinked.planning.planner import solve
from lingualinked.planning.prediction import value_of
from lingualinked.planning.scaling import scale_times
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import DeviceProfile, Profile
from lingualinked.quantities import count_text
from lingualinked.registry import explanation_of
from lingualinked.units import MOST_BYTES
from lingualinked.workload import Objective


def explain_plan(plan: Plan) -> Explanation:
    """Explain a plan that has a profile."""
    profile = plan.measured
    objective = _objective(plan)
    copies = [
        weigh_change(plan, f"a second {name!r}", profile.with_copy(name, unused_name(f"{name}-2", profile)))
        for name in plan.devices
    ]
    what_ifs = (weigh_change(plan, change, changed) for change, changed in _changes(plan, profile))
    return Explanation(
        limit=_limit(plan, objective),
        another_device=max(copies, key=lambda each: each.gain),
        what_ifs=tuple(sorted(what_ifs, key=lambda each: each.gain, reverse=True)),
        objective=objective,
        tokens_per_s=_rate(plan, objective),
        fewer_devices=_fewer_devices(plan) if objective == "throughput" else "",
    )


def weigh_change(plan: Plan, change: str, changed: Profile) -> WhatIf:
    """Return what the best plan would do with a changed profile."""
    objective = _objective(plan)
    try:
        best = solve(
            changed,
            objective=objective,
            workload=plan.workload,
            reserve=plan.reserve,
            min_tokens_per_s=plan.solved.min_tokens_per_s if plan.solved else None,
            num_sessions=plan.solved.num_sessions if plan.solved else None,
        )
    except InfeasiblePlanError:  # what was placed by hand need not respect every limit
        return WhatIf(change=change, gain=1.0, tokens_per_s=_rate(plan, objective))
    gain = _value(plan, objective) / _value(best, objective)
    return WhatIf(change=change, gain=gain, tokens_per_s=_rate(best, objective))


def unused_name(name: str, profile: Profile) -> str:
    """Return a name like this one that no device of a profile has."""
    while name in (CALLER, *profile.names):
        name += "'"
    return name


def _objective(plan: Plan) -> Objective:
    return plan.solved.objective if plan.solved else "throughput"


def _fewer_devices(plan: Plan) -> str:
    """Say where fewer devices are faster: for the sessions of the workload, or for one at a time."""
    workload = plan.predicted.workload
    for num_sessions in dict.fromkeys((workload.num_sessions, 1)):
        try:
            best = solve(plan.measured, workload=plan.workload, reserve=plan.reserve, num_sessions=num_sessions)
        except InfeasiblePlanError:  # what was placed by hand need not respect every limit
            return ""
        in_flight = dataclasses.replace(workload, num_sessions=num_sessions)
        now, then = (each.predict(in_flight).tokens_per_s for each in (plan, best))
        if len(best.devices) < len(plan.devices) and then > 1.01 * now:
            only, names = len(best.devices) == 1, ", ".join(map(repr, best.devices))
            return (
                f"With {count_text(num_sessions, 'session')} in flight, fewer devices would be faster: {names} "
                f"{'alone gives' if only else 'give'} {then:.1f} tokens/s instead of {now:.1f}."
            )
    return ""


def _limit(plan: Plan, objective: Objective) -> str:
    predicted = plan.predicted
    costs = WorkloadCosts(plan.measured, predicted.workload, plan.reserve)
    layers = enumerate(plan.measured.model.layer_weight_bytes)
    smallest = min(weight_bytes + costs.layer_kv_bytes(index) for index, weight_bytes in layers)
    full = [
        use.device
        for use in predicted.devices
        if costs.capacity_bytes(plan.measured.device(use.device)) - use.used_bytes < smallest
    ]
    memory = f" The memory of {', '.join(map(repr, full))} is full, which keeps layers elsewhere." if full else ""
    if objective == "throughput":
        limit = predicted.limited_by
        what = f"The {limit}" if limit.startswith("link") else f"The speed of {limit}"
        said = f"{what} limits it: {predicted.seconds_of(limit) * 1e3:.1f} ms of every step."
        if limit != predicted.bottleneck or (len(predicted.stages) > 1 and predicted.is_latency_bound):
            said += (
                f" A step takes {predicted.latency_s * 1e3:.1f} ms in all, and "
                f"{count_text(predicted.workload.num_sessions, 'session')} in flight can't keep every device busy."
            )
        return said + memory
    compute = sum(predicted.mean(stage.prefill_s, stage.decode_s) for stage in predicted.stages)
    hops = predicted.request_s / predicted.workload.new_tokens - compute
    slowest = max(predicted.stages, key=lambda stage: predicted.mean(stage.prefill_s, stage.decode_s))
    return (
        f"A step computes for {compute * 1e3:.1f} ms, most of it on {slowest.device!r}, and is on its way for "
        f"{hops * 1e3:.1f} ms.{memory}"
    )


def _changes(plan: Plan, profile: Profile) -> Iterator[tuple[str, Profile]]:
    for name in plan.devices:
        faster = scale_times(profile.device(name), prefill=0.5, decode=0.5)
        yield f"{name!r} twice as fast", _replaced(profile, name, faster)
    for use in plan.predicted.devices:
        if use.capacity_bytes is not None:
            device = profile.device(use.device)
            more = dataclasses.replace(device.device, memory=min(2 * use.capacity_bytes, MOST_BYTES))
            freer = dataclasses.replace(device, device=more, free_bytes=None)
            yield f"{use.device!r} with twice the memory", _replaced(profile, use.device, freer)
    for name in plan.devices:
        links = tuple(
            dataclasses.replace(
                link,
                latency_s=link.latency_s / 2,
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s and 2 * link.bandwidth_bytes_per_s,
            )
            if name in (link.source, link.target)
            else link
            for link in profile.links
        )
        yield f"links of {name!r} twice as fast", dataclasses.replace(profile, links=links)


def _value(plan: Plan, objective: Objective) -> float:
    if plan.solved is not None and plan.solved.objective == objective:
        return plan.solved.value
    return value_of(plan.predicted, objective)


def _rate(plan: Plan, objective: Objective) -> float:
    predicted = plan.predicted
    if plan.solved is not None and plan.solved.num_sessions is not None:
        predicted = plan.predict(dataclasses.replace(predicted.workload, num_sessions=plan.solved.num_sessions))
    return predicted.stream_tokens_per_s if objective == "latency" else predicted.tokens_per_s


def _replaced(profile: Profile, name: str, changed: DeviceProfile) -> Profile:
    devices = tuple(changed if each.device.name == name else each for each in profile.devices)
    return dataclasses.replace(profile, devices=devices)


explanation_of.register(Plan, explain_plan)

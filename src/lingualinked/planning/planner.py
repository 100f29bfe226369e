"""From a profile to the best plan that can be found, with a proof of how good it is.

Knows profiles, workloads and the solver of placement problems; no process and no model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

from lingualinked.checks import MOST, is_count, is_number
from lingualinked.errors import ArgumentError, InfeasiblePlanError
from lingualinked.planning.holding import parts_to_hold, with_parts_held
from lingualinked.planning.microbatches import exact_numbers
from lingualinked.planning.placement.baselines import by_memory, even, sum_objective
from lingualinked.planning.placement.problem import Placement, Problem
from lingualinked.planning.placement.solver import solve_problem
from lingualinked.planning.plan import DEFAULT_RESERVE, Plan
from lingualinked.planning.prediction import Prediction, step_s_of
from lingualinked.planning.remedy import add_remedy, model_fits
from lingualinked.planning.solved import Solved
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import Profile
from lingualinked.workload import Objective, Workload, check_objective

_BASELINES = {"even": even, "by_memory": by_memory, "sum_objective": sum_objective}
_MOST_DELAY = 1.1  # times as long as need be for one session, of a plan that is to be fast for several as well
_LEAST_GAIN = 1.25  # times the tokens per second of a full pipeline for which one session may take longer
_FASTEST = 1e12  # tokens per second that nobody asks for: beyond, the seconds of a step are no numbers any more


def solve(
    profile: Profile,
    *,
    objective: Objective = "throughput",
    workload: Workload | None = None,
    order: Sequence[str] | None = None,
    min_tokens_per_s: float | None = None,
    reserve: float = DEFAULT_RESERVE,
    num_sessions: int | Literal["any"] | None = None,
) -> Plan:
    r"""Place layers on devices by solving a linear programme over what was measured.

    A request of the workload is one prefill and ``new_tokens - 1`` decode steps. Its mean step costs layer :math:`i`
    on device :math:`d` :math:`c_{di}` seconds, a stage :math:`c_d` besides, and a hop :math:`h_{de}` seconds. Spans
    :math:`[s_k, s_{k+1})` on distinct devices :math:`d_1, \dots, d_K` (one that is trusted may be both the first and the
    last) are chosen to minimise

    - ``"latency"``: :math:`\sum_k (c_{d_k} + \sum_{i=s_k}^{s_{k+1}-1} c_{d_k i}) + \sum_k h_{d_k d_{k+1}}`, from the
      caller and back to it;
    - ``"throughput"``: the seconds between two steps with ``num_sessions`` in flight, :math:`\max(B, \text{latency} /
      \text{num\_sessions})`. The bottleneck :math:`B` is the :math:`\max` over the devices of their stages'
      :math:`c_{d} + \sum_i c_{di}`, and over the links of their transfer time; its inverse is a full pipeline's rate.
      One session is served best by the plan of least latency, often on fewer devices; many by the one of least
      bottleneck. Among equals, the latency. A batch that runs as :math:`m` microbatches is :math:`m` steps of fewer rows in
      flight; the best :math:`m` of those that change no bit is chosen, unless the workload has one;
    - ``"energy"``: :math:`\sum_k w_{d_k} (c_{d_k} + \sum_i c_{d_k i})` with each device's power :math:`w_d`, where the
      bottleneck leaves at least ``min_tokens_per_s``;

    subject to weights, KV of all sessions and working memory of each device staying within its memory less the reserve,
    and, once any device is ``trusted``, to the first and the last span lying on such.
    `lingualinked.planning.placement.solver.solve_problem` says how.

    Parameters
    ----------
    profile : Profile
        The model on the devices; see `profile_model`.
    objective : {"throughput", "latency", "energy"}
        What to minimise.
    workload : Workload or None
        What is planned for; ``None``: the default one, with any number of sessions.
    order : sequence of str or None
        Devices in pipeline order, if it is fixed; it may leave some out. ``None``: any order.
    min_tokens_per_s : float or None
        Floor on a full pipeline's tokens per second, over all rows; for ``"energy"``.
    reserve : float
        Share of every device's memory to leave free, from 0 to below 1.
    num_sessions : int, "any" or None
        Sessions in flight to be fast for, where they are not those of the workload, whose KV has room in any case. ``"any"``: not
        known. Then ``"throughput"`` is that of as many sessions, up to the number of devices, as let one session alone take at
        most 1.1 times as long as it would in the plan of least latency; which is taken if a full pipeline gains less than 1.25
        times.

    Returns
    -------
    Plan
        With `Plan.predicted`, and in `Plan.solved` a proven bound on how much better any placement could be.

    Raises
    ------
    ArgumentError
        If an argument can't be used, or ``"energy"`` is asked for and a device's ``watts`` are not known.
    InfeasiblePlanError
        If nothing fits; the message says how many bytes are missing, where, and what would fit.

    References
    ----------
    J. Zhao et al., "LinguaLinked: A Distributed Large Language Model Inference System for Mobile Devices",
    arXiv:2312.00388, whose objective is the sum; it never rewards a pipeline's overlap.
    """
    _check_arguments(profile, objective, min_tokens_per_s, reserve)
    if workload is None and num_sessions is None:
        num_sessions = "any"
    workload = profile.model.fit_workload(workload)
    if parts := parts_to_hold(profile, workload):
        holding = with_parts_held(profile, parts)
        with contextlib.suppress(InfeasiblePlanError):  # else their outputs are sent
            return _solve(holding, objective, workload, order, min_tokens_per_s, reserve, num_sessions)
    profile = with_parts_held(profile, ())
    return _solve(profile, objective, workload, order, min_tokens_per_s, reserve, num_sessions)


def _solve(
    profile: Profile,
    objective: Objective,
    workload: Workload,
    order: Sequence[str] | None,
    min_tokens_per_s: float | None,
    reserve: float,
    num_sessions: int | Literal["any"] | None,
) -> Plan:
    """Place layers where it is decided what every stage holds."""
    if num_sessions == "any":
        solve_for = functools.partial(_solve, profile, objective, workload, order, min_tokens_per_s, reserve)
        if objective != "throughput":
            return solve_for(num_sessions=None)
        return _solve_for_any(lambda number: solve_for(num_sessions=number), len(profile.devices))
    if num_sessions is not None and not is_count(num_sessions):
        raise ArgumentError(f'num_sessions={num_sessions!r} must be a positive integer, at most {MOST}, or "any"')
    numbers = exact_numbers(profile, profile.names, workload) if workload.num_microbatches is None else []
    if len(numbers) > 1 and objective != "energy":  # for which weights are best read once
        splits = [dataclasses.replace(workload, num_microbatches=number) for number in numbers]
        others = order, min_tokens_per_s, reserve, num_sessions
        plans = [_solve(profile, objective, split, *others) for split in splits]
        return min(plans, key=lambda plan: step_s_of(_in_flight(plan, num_sessions), objective))
    if workload.prefill_chunk_size is not None and objective != "energy":  # which chunks leave as it is
        return _solve_in_chunks(profile, objective, workload, order, min_tokens_per_s, reserve, num_sessions)
    return _solve_whole(profile, objective, workload, order, min_tokens_per_s, reserve, num_sessions)


def _solve_whole(
    profile: Profile,
    objective: Objective,
    workload: Workload,
    order: Sequence[str] | None,
    min_tokens_per_s: float | None,
    reserve: float,
    num_sessions: int | None,
) -> Plan:
    """Place layers for one number of microbatches, as if no chunk of a prompt began before the one before has ended."""
    if workload.prefill_chunk_size == "auto":
        workload = dataclasses.replace(workload, prefill_chunk_size=None)
    split = workload.num_microbatches or 1
    problem = WorkloadCosts(profile, workload, reserve).problem()
    if num_sessions is not None:
        problem = dataclasses.replace(problem, num_sessions=split * num_sessions)
    floor_s = None if min_tokens_per_s is None else workload.step_rows / float(min_tokens_per_s)
    minimised = objective
    if objective == "latency" and split > 1:  # of all rows, whose microbatches are in flight together
        minimised, problem = "throughput", dataclasses.replace(problem, num_sessions=split)
    indices = _indices(order, profile)
    try:
        solution = solve_problem(problem, minimised, order=indices, max_bottleneck_s=floor_s)
    except InfeasiblePlanError as error:
        if floor_s is not None and model_fits(profile, workload, reserve):
            full = dataclasses.replace(problem, num_sessions=math.inf)
            fastest = workload.step_rows / solve_problem(full, order=indices).value
            raise InfeasiblePlanError(
                f"no plan gives min_tokens_per_s={min_tokens_per_s:g}: the fastest gives {fastest:.1f} tokens/s with its "
                "pipeline full; ask for less, or add a device"
            ) from error
        raise add_remedy(error, profile, workload, reserve) from error
    plan = _plan(problem, solution.placement, profile, workload, reserve)
    value = split * solution.value
    if split > 1 and objective != "energy":
        value = step_s_of(_in_flight(plan, num_sessions), objective)  # until the first of them is through, others wait
    used = {span.device for span in solution.placement}
    solved = Solved(
        objective=objective,
        value=value,
        lower_bound=split * solution.lower_bound,
        unused=tuple(name for index, name in enumerate(problem.names) if index not in used),
        min_tokens_per_s=min_tokens_per_s,
        num_sessions=num_sessions,
    )
    return dataclasses.replace(plan, solved=solved)


def _solve_in_chunks(
    profile: Profile,
    objective: Objective,
    workload: Workload,
    order: Sequence[str] | None,
    min_tokens_per_s: float | None,
    reserve: float,
    num_sessions: int | None,
) -> Plan:
    r"""Return the best plan for prompts in chunks that is found, and a bound on all.

    Chunks let one session keep several stages busy, as more sessions would: the plans of least interval for more and more sessions,
    from least latency to least bottleneck, are held against each other with their chunks.

    A chunk's way may leave the others in any stage :math:`s`: the prompt takes at least what the first chunk takes before
    :math:`s`, all of them in :math:`s`, and the last one behind it. On the mean over at most :math:`n` stages that is a sum
    of costs, in each stage :math:`m + (w - m) / n`, where all chunks take :math:`w`, and the quicker one of the first and
    the last :math:`m`. So the least latency for these costs is a bound, and the least bottleneck another.
    """
    # 1) plans from the least latency to the least bottleneck
    sessions = workload.num_sessions if num_sessions is None else num_sessions
    num_devices = len(profile.devices)
    numbers = [sessions * 2**power for power in range((2 * num_devices).bit_length())]
    arguments = order, min_tokens_per_s, reserve
    plans = [_solve_whole(profile, "throughput", workload, *arguments, number) for number in numbers]
    plans.append(_solve_whole(profile, "latency", workload, *arguments, None))
    plans = [dataclasses.replace(plan, workload=workload) for plan in plans]
    best = min(plans, key=lambda plan: step_s_of(_in_flight(plan, num_sessions), objective))
    predicted = _in_flight(best, num_sessions)
    # 2) the bound, for the chunks that were chosen
    chosen = dataclasses.replace(workload, prefill_chunk_size=predicted.workload.prefill_chunk_size)
    num_stages = min(num_devices + any(each.device.trusted for each in profile.devices), profile.model.num_layers)
    split, indices = workload.num_microbatches or 1, _indices(order, profile)
    relaxed = WorkloadCosts(profile, chosen, reserve, num_overlapping=num_stages).problem()
    bound = solve_problem(relaxed, "latency", order=indices).lower_bound
    if objective == "throughput":
        full = dataclasses.replace(WorkloadCosts(profile, chosen, reserve).problem(), num_sessions=math.inf)
        bound = max(bound / sessions, split * solve_problem(full, order=indices).lower_bound)
    assert best.solved is not None
    solved = dataclasses.replace(
        best.solved,
        objective=objective,
        value=step_s_of(predicted, objective),
        lower_bound=bound,
        num_sessions=num_sessions,
    )
    return dataclasses.replace(best, solved=solved)


def _solve_for_any(solve_for: Callable[[int], Plan], num_devices: int) -> Plan:
    """Return the plan for as many sessions as hardly delay one alone: the more there are, the longer one takes."""
    quickest = best = solve_for(1)
    fewest, most = 1, num_devices
    while fewest < most:
        number = (fewest + most + 1) // 2
        plan = solve_for(number)
        if plan.predicted.latency_s <= _MOST_DELAY * quickest.predicted.latency_s:
            best, fewest = plan, number
        else:
            most = number - 1
    gain = best.predicted.pipeline_tokens_per_s / quickest.predicted.pipeline_tokens_per_s
    return best if gain >= _LEAST_GAIN else quickest


def _in_flight(plan: Plan, num_sessions: int | None) -> Prediction:
    """Predict a plan with so many sessions in flight, in place of those of its workload."""
    predicted = plan.predicted
    if num_sessions is None:
        return predicted
    return plan.predict(dataclasses.replace(predicted.workload, num_sessions=num_sessions))


def baseline(
    profile: Profile, kind: str, *, workload: Workload | None = None, reserve: float = DEFAULT_RESERVE
) -> Plan:
    """Place layers as others do, on the devices in their order: to compare with.

    Parameters
    ----------
    profile : Profile
        The model on the devices.
    kind : {"even", "by_memory", "sum_objective"}
        As many layers on each; in proportion to memory; or with the smallest sum of compute and communication, which is
        the objective of LinguaLinked (arXiv:2312.00388).
    workload : Workload or None
        What is planned for.
    reserve : float
        Share of every device's memory to leave free.

    Returns
    -------
    Plan

    Raises
    ------
    ArgumentError
        If an argument can't be used.
    InfeasiblePlanError
        If it does not fit.
    """
    if not isinstance(kind, str) or kind not in _BASELINES:
        raise ArgumentError(f"kind={kind!r} must be one of {sorted(_BASELINES)}")
    _check_arguments(profile, "throughput", None, reserve)
    workload = profile.model.fit_workload(workload)
    problem = WorkloadCosts(profile, workload, reserve).problem()
    return _plan(problem, _BASELINES[kind](problem), profile, workload, reserve)


def _plan(problem: Problem, placement: Placement, profile: Profile, workload: Workload, reserve: float) -> Plan:
    spans = [(problem.names[span.device], span.start, span.end) for span in placement]
    return dataclasses.replace(Plan.from_spans(spans, profile=profile, workload=workload), reserve=reserve)


def _check_arguments(profile: object, objective: object, min_tokens_per_s: object, reserve: object) -> None:
    if not isinstance(profile, Profile):
        raise ArgumentError(
            f"profile is a {type(profile).__name__}: give a lingualinked.Profile (profile_model makes one)"
        )
    check_objective(objective)
    if not is_number(reserve) or not 0 <= reserve < 1:
        raise ArgumentError(f"reserve={reserve!r} must be a share of memory, from 0 to below 1")
    if min_tokens_per_s is not None and (not is_number(min_tokens_per_s) or not 0 < min_tokens_per_s < _FASTEST):
        raise ArgumentError(f"min_tokens_per_s={min_tokens_per_s!r} must be a positive, finite number")
    if objective == "energy":
        for each in profile.devices:
            if each.watts is None:
                unmeasured = f", whose power was not measured: {each.power_source}" if each.power_source else ""
                raise ArgumentError(f'objective="energy" needs watts= of device {each.device.name!r}{unmeasured}')


def _indices(order: Sequence[str] | None, profile: Profile) -> tuple[int, ...] | None:
    if order is None:
        return None
    if not isinstance(order, Sequence) or isinstance(order, str) or not all(isinstance(name, str) for name in order):
        raise ArgumentError(f"order={order!r} must be a list of device names")
    for name in order:
        profile.device(name)
        if list(order).count(name) > 1:
            raise ArgumentError(f"order={list(order)} has {name!r} twice")
    if not order:
        raise ArgumentError("order is empty: a plan needs at least one device")
    return tuple(profile.names.index(name) for name in order)

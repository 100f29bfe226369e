"""The solver finds the optimum wherever every placement can be tried, and proves how close it is elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import optimize

from lingualinked.errors import ArgumentError, InfeasiblePlanError, LingualinkedError
from lingualinked.planning.placement import search, solver
from lingualinked.planning.placement.network import shortest_along
from lingualinked.planning.placement.problem import (
    Placement,
    Problem,
    Solution,
    bottleneck_s,
    device_bytes,
    energy_j,
    interval_s,
    latency_s,
)
from lingualinked.planning.placement.programme import Programme
from lingualinked.planning.placement.solver import solve_problem
from lingualinked.planning.placement.sweep import sweep_caps
from lingualinked.planning.placement.tables import SpanTables, bottleneck_costs, sum_costs
from lingualinked.workload import Objective
from placements import Judged, best_along, draw_problem, every_placement
from random_problems import random_problem

VALUES: dict[Objective, Callable[[Problem, Placement], float]] = {
    "throughput": interval_s,
    "latency": latency_s,
    "energy": energy_j,
}
SESSIONS = st.sampled_from([*range(1, 9), math.inf])
OBJECTIVES = st.sampled_from(list(VALUES))
SUMMED_DIFFERENTLY = (
    1e-9  # relative: oracle and solver add the same numbers in different orders, and HiGHS stops at 1e-10
)
TIED = 1e-12  # relative: where costs are of all magnitudes, some are near and yet no ties


@st.composite
def problems(draw: st.DrawFn, max_layers: int = 12) -> Problem:
    num_devices = draw(st.integers(1, 6))
    return draw_problem(
        draw(st.integers(0, 2**32)),
        draw(st.integers(1, max_layers if num_devices <= 4 else 5)),
        num_devices,
        whole=draw(st.booleans()),
        tight=draw(st.booleans()),
        gaps=draw(st.booleans()),
        rings=draw(st.booleans()),
        spread=draw(st.booleans()),
        num_sessions=draw(SESSIONS),
        kept=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
    )


def value_of(judged: Judged, objective: Objective) -> float:
    return {"throughput": judged.interval_s, "latency": judged.latency_s, "energy": judged.energy_j}[objective]


def solved(problem: Problem, objective: Objective, **kwargs: Any) -> Solution | None:
    try:
        return solve_problem(problem, objective, **kwargs)
    except InfeasiblePlanError:
        return None


def assert_best(solution: Solution | None, choices: list[Judged], objective: Objective) -> None:
    assert (solution is None) == (not choices)
    if solution is None:
        return
    best = min(value_of(judged, objective) for judged in choices)
    assert solution.value == pytest.approx(best, rel=SUMMED_DIFFERENTLY, abs=0)
    assert solution.lower_bound == solution.value
    chosen = next(judged for judged in choices if judged.placement == solution.placement)  # allowed, so in the list
    ties = [judged.latency_s for judged in choices if value_of(judged, objective) <= best * (1 + TIED)]
    assert chosen.latency_s == pytest.approx(min(ties), rel=SUMMED_DIFFERENTLY)


@given(problem=problems(), objective=OBJECTIVES)
def test_no_placement_in_any_order_is_better(problem: Problem, objective: Objective) -> None:
    assert_best(solved(problem, objective), every_placement(problem), objective)


@given(problem=problems(), objective=OBJECTIVES, data=st.data())
def test_no_placement_in_a_given_order_is_better(problem: Problem, objective: Objective, data: st.DataObject) -> None:
    devices = range(problem.num_devices)
    order = tuple(data.draw(st.lists(st.sampled_from(devices), min_size=1, unique=True)))
    assert_best(solved(problem, objective, order=order), every_placement(problem, order), objective)


@given(problem=problems(8), objective=OBJECTIVES, share=st.floats(0, 1))
def test_no_placement_within_a_bottleneck_is_better(problem: Problem, objective: Objective, share: float) -> None:
    choices = every_placement(problem)
    limit = float(np.quantile([judged.bottleneck_s for judged in choices] or [1.0], share))
    limit = max(limit * (1 + SUMMED_DIFFERENTLY), 1e-30)
    within = [judged for judged in choices if judged.bottleneck_s <= limit]
    assert_best(solved(problem, objective, max_bottleneck_s=limit), within, objective)


@given(
    seed=st.integers(0, 2**32),
    num_layers=st.integers(1, 128),
    num_devices=st.integers(1, 32),
    flags=st.tuples(*[st.booleans()] * 3),
    objective=st.sampled_from(["throughput", "latency"]),
)
@settings(max_examples=15)
def test_a_large_fixed_order_is_solved_exactly(
    seed: int, num_layers: int, num_devices: int, flags: tuple[bool, ...], objective: Objective
) -> None:
    whole, tight, gaps = flags
    problem = draw_problem(seed, num_layers, num_devices, whole=whole, tight=tight, gaps=gaps, rings=False)
    order = tuple(range(num_devices))
    solution, best = solved(problem, objective, order=order), best_along(problem, order, objective)
    assert (solution is None) == math.isinf(best)
    if solution is not None:
        assert solution.value == pytest.approx(best, rel=SUMMED_DIFFERENTLY)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_the_largest_fixed_order_is_solved_exactly(objective: Objective) -> None:
    problem = random_problem(3, num_layers=128, num_devices=32, num_kinds=3)
    order = tuple(range(32))
    solution = solve_problem(problem, objective, order=order)
    assert solution.value == pytest.approx(best_along(problem, order, objective), rel=SUMMED_DIFFERENTLY)


@given(problem=problems(8), objective=OBJECTIVES)
@settings(max_examples=60)
def test_a_programme_that_is_given_its_arcs_bit_by_bit_is_exact(problem: Problem, objective: Objective) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MAX_ARCS", 12)  # as if there were too many
        solution = solved(problem, objective)
    choices = every_placement(problem)
    assert (solution is None) == (not choices)
    if solution is None:
        return
    best = min(value_of(judged, objective) for judged in choices)
    assert solution.value == pytest.approx(best, rel=SUMMED_DIFFERENTLY, abs=0)
    assert solution.lower_bound <= best * (1 + SUMMED_DIFFERENTLY)
    assert any(judged.placement == solution.placement for judged in choices)


@given(problem=problems(8), objective=OBJECTIVES)
@settings(max_examples=60)
def test_where_a_gap_is_accepted_the_bound_holds(problem: Problem, objective: Objective) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MAX_ARCS", 12)
        patch.setattr(solver, "EXACT_SIZE", 0)  # as if there were too many devices
        solution = solved(problem, objective)
    choices = every_placement(problem)
    assert (solution is None) == (not choices)
    if solution is None:
        return
    best = min(value_of(judged, objective) for judged in choices)
    assert solution.lower_bound <= best * (1 + SUMMED_DIFFERENTLY)
    assert solution.value >= best * (1 - SUMMED_DIFFERENTLY)
    assert solution.value <= best * (1 + 2 * solver.LARGE_GAP)
    assert any(judged.placement == solution.placement for judged in choices)


@pytest.mark.parametrize("objective", VALUES)
@pytest.mark.parametrize("seed", range(4))
def test_a_few_arcs_at_a_time_lead_to_what_all_lead_to(
    monkeypatch: pytest.MonkeyPatch, objective: Objective, seed: int
) -> None:
    problem = random_problem(seed, num_layers=30, num_devices=8, num_kinds=1 + seed % 3)
    best = solve_problem(problem, objective).value
    monkeypatch.setattr(search, "MAX_ARCS", 200)
    assert solve_problem(problem, objective).value == pytest.approx(best, rel=SUMMED_DIFFERENTLY)


@pytest.mark.parametrize("seed", range(6))
def test_no_bound_exceeds_the_best_where_a_gap_is_accepted(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    problem = random_problem(seed, num_layers=10, num_devices=6)
    tables = SpanTables.of(problem)
    programme = Programme(sum_costs(problem, bottleneck_costs(problem, tables), tables))
    best = solve_problem(problem, "latency").value
    monkeypatch.setattr(search, "MAX_ARCS", 12)
    for above in (1.01, 1.1, 1.3):
        assert search.cheapest(programme, above * best, gap=0.3).bound <= best * (1 + SUMMED_DIFFERENTLY)


@pytest.mark.parametrize("seed", range(6))
def test_no_bound_exceeds_the_best_where_nothing_is_found_within_a_cap(seed: int) -> None:
    problem = random_problem(seed, num_layers=10, num_devices=6)
    costs, best = bottleneck_costs(problem, SpanTables.of(problem)), solve_problem(problem).value
    known = solve_problem(problem, "latency").placement

    def undecided(cap: float, _: float) -> tuple[Placement, float]:
        return (), math.inf if cap < best * (1 - SUMMED_DIFFERENTLY) else 0.0

    _, bound = sweep_caps(costs, known, functools.partial(bottleneck_s, problem), undecided)
    assert bound == pytest.approx(best, rel=SUMMED_DIFFERENTLY)


@pytest.mark.parametrize("most", [0, 7, 400, 10**9])
def test_of_very_many_arcs_the_nearest_are_listed(most: int) -> None:
    problem = random_problem(1, num_layers=12, num_devices=5, rings=True)
    tables = SpanTables.of(problem)
    programme = Programme(sum_costs(problem, bottleneck_costs(problem, tables), tables))
    every, bound = programme.arcs(programme.no_prices(), programme.ceiling)
    pool = every.keys[np.argsort(every.length)[-3:]]
    some, same_bound = programme.arcs(programme.no_prices(), programme.ceiling, most, pool)
    assert bound == same_bound
    assert min(most + 1, len(every)) <= len(some) <= (1 + problem.num_devices) * (most + 1) + len(pool)
    assert np.array_equal(np.sort(some.length)[:most], np.sort(every.length)[:most])
    assert most >= len(every) or np.isin(pool, some.keys).all()


@pytest.mark.parametrize("seed", [3, 16])
def test_ties_in_energy_go_to_the_lower_latency(seed: int) -> None:
    problem = random_problem(seed, num_layers=32, num_devices=8, num_kinds=1 + seed % 3)
    solution, tables = solve_problem(problem, "energy"), SpanTables.of(problem)
    joules = sum_costs(problem, bottleneck_costs(problem, tables), tables, watts=problem.watts)
    for order in itertools.permutations({span.device for span in solution.placement}):
        value, other = shortest_along(joules, [order])
        assert value >= solution.value * (1 - SUMMED_DIFFERENTLY)
        if other and value <= solution.value * (1 + SUMMED_DIFFERENTLY):
            assert latency_s(problem, other) >= latency_s(problem, solution.placement) * (1 - SUMMED_DIFFERENTLY)


@pytest.mark.parametrize("seed", range(3))
def test_ties_in_a_fixed_order_go_to_the_lower_latency(seed: int) -> None:
    problem = random_problem(seed, num_layers=64, num_devices=16, num_kinds=1 + seed % 3)
    trusted = np.arange(16) == 5
    problem = dataclasses.replace(problem, may_be_first=trusted, may_be_last=trusted, may_close=trusted)
    order = (5, *np.random.default_rng(seed).permutation([*range(5), *range(6, 16)]).tolist())
    solution, tables = solve_problem(problem, order=order), SpanTables.of(problem)
    within = sum_costs(problem, bottleneck_costs(problem, tables).at_most(solution.value), tables)
    best_s, _ = shortest_along(within, [order])
    assert latency_s(problem, solution.placement) == pytest.approx(best_s, rel=SUMMED_DIFFERENTLY)


def test_on_language_models_there_is_no_gap() -> None:
    gaps = []
    for seed in range(6):
        problem = random_problem(seed, num_kinds=1 + seed % 3)
        solution = solve_problem(problem)
        assert solution.value == bottleneck_s(problem, solution.placement)
        assert all(
            device_bytes(problem, solution.placement, span.device) <= problem.capacity_bytes[span.device]
            for span in solution.placement
        )
        gaps.append(solution.value / solution.lower_bound - 1)
    assert max(gaps) == 0


@pytest.mark.parametrize("objective", VALUES)
@pytest.mark.parametrize("order", [None, (1, 0, 2)], ids=["free", "fixed"])
def test_without_linprog_nothing_is_solved(
    monkeypatch: pytest.MonkeyPatch, objective: Objective, order: tuple[int, ...] | None
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no linprog")

    monkeypatch.setattr(optimize, "linprog", refuse)
    with pytest.raises(RuntimeError, match="no linprog"):
        solve_problem(draw_problem(1, 6, 3, rings=False), objective, order=order)


@pytest.mark.parametrize(
    ("status", "error"), [(1, LingualinkedError), (2, InfeasiblePlanError), (4, LingualinkedError)]
)
def test_the_status_of_linprog_is_heeded(
    monkeypatch: pytest.MonkeyPatch, status: int, error: type[LingualinkedError]
) -> None:
    answer = optimize.OptimizeResult(status=status, message="as the test says", x=None, fun=None)
    monkeypatch.setattr(optimize, "linprog", lambda *args, **kwargs: answer)
    with pytest.raises(error, match="as the test says"):
        solve_problem(draw_problem(1, 6, 3, rings=False), order=(0, 1, 2))


@pytest.mark.parametrize("objective", VALUES)
@pytest.mark.parametrize("seed", range(4))
def test_fractional_flows_are_made_whole(monkeypatch: pytest.MonkeyPatch, objective: Objective, seed: int) -> None:
    problem = draw_problem(seed, 6, 3, rings=False)
    best, linprog = solve_problem(problem, objective), optimize.linprog

    def half(*args: Any, **kwargs: Any) -> Any:
        result = linprog(*args, **kwargs)
        result.x = None if result.x is None else result.x / 2
        return result

    monkeypatch.setattr(optimize, "linprog", half)
    solution = solve_problem(problem, objective)
    assert (solution.value, solution.lower_bound) == (best.value, best.lower_bound)


@given(seed=st.integers(0, 2**32), num_layers=st.integers(1, 10), factor=st.floats(1.5, 20))
@settings(max_examples=40)
def test_another_slow_device_makes_nothing_worse(seed: int, num_layers: int, factor: float) -> None:
    more = draw_problem(seed, num_layers, 4, whole=True)
    slow = more.layer_s.copy()
    slow[3] = more.layer_s[:3].max(axis=0) * factor
    more = dataclasses.replace(more, layer_s=slow)
    before, after = solved(fewer_devices(more, 3), "throughput"), solved(more, "throughput")
    if before is not None:
        assert after is not None
        assert after.value <= before.value * (1 + SUMMED_DIFFERENTLY)


def fewer_devices(problem: Problem, count: int) -> Problem:
    """Leave out the devices from `count` on."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(Problem):
        value = getattr(problem, field.name)
        if field.name in ("hop_s", "busy_s"):
            changes[field.name] = value[:count, :count]
        elif field.name not in ("layer_bytes", "forbidden_cuts", "shortcuts") and not isinstance(value, int | float):
            changes[field.name] = value[:count]
    return dataclasses.replace(problem, **changes)


def simple(num_devices: int, num_layers: int, **changes: Any) -> Problem:
    """Devices that take a second per layer, have no limits, and lie a tenth of a second apart."""
    ones, zeros = np.ones(num_devices), np.zeros(num_devices)
    fields: dict[str, Any] = {
        "names": tuple("abcdefgh"[:num_devices]),
        "layer_s": np.ones((num_devices, num_layers)),
        "hop_s": np.full((num_devices, num_devices), 0.1),
        "busy_s": np.full((num_devices, num_devices), 0.05),
        "layer_bytes": np.full(num_layers, 10.0),
        "capacity_bytes": ones * np.inf,
        "may_be_first": ones > 0,
        "may_be_last": ones > 0,
        "may_close": ones < 0,
        "watts": ones,
        **dict.fromkeys(("first_bytes", "last_bytes", "tied_bytes"), 0.0),
        **dict.fromkeys(("stage_s", "first_s", "last_s", "stage_bytes"), zeros),
        **dict.fromkeys(("enter_s", "enter_busy_s", "leave_s", "leave_busy_s"), zeros),
    }
    return Problem(**(fields | changes))


def test_ties_in_throughput_go_to_the_lower_latency() -> None:
    speeds = np.array([2.0, 1.0, 1.0])  # a's one layer of two seconds is the bottleneck, whatever b and c do
    problem = simple(3, 4, layer_s=speeds[:, None] * np.ones(4), may_be_first=np.array([True, False, False]))
    solution = solve_problem(problem)
    assert solution.value == 2
    assert len(solution.placement) == 3
    assert latency_s(problem, solution.placement) == pytest.approx(2 + 3 + 0.2)  # two layers on a would take longer


@pytest.mark.parametrize("seed", range(4))
def test_a_tie_goes_to_the_lower_latency_however_slow_the_first_placement_is(seed: int) -> None:
    hop_s = 0.1 + 1e-7 * np.random.default_rng(seed).permutation(16).reshape(4, 4)
    hop_s[0, 1] = hop_s[1, 2] = 1e7  # in the listed order, which is tried first
    problem = simple(4, 4, hop_s=hop_s, busy_s=np.zeros((4, 4)))
    best_s = min(sum(hop_s[a, b] for a, b in itertools.pairwise(order)) for order in itertools.permutations(range(4)))
    assert latency_s(problem, solve_problem(problem).placement) == pytest.approx(4 + best_s, rel=TIED)


@given(problem=problems(6), objective=OBJECTIVES, power=st.sampled_from([-100, -30, 30, 100]))
@settings(max_examples=60)
def test_a_plan_does_not_depend_on_the_unit_of_time(problem: Problem, objective: Objective, power: int) -> None:
    seconds = [field.name for field in dataclasses.fields(problem) if field.name.endswith("_s")]
    scaled = dataclasses.replace(problem, **{name: getattr(problem, name) * 2.0**power for name in seconds})
    one, other = solved(problem, objective), solved(scaled, objective)
    assert (one and one.placement) == (other and other.placement)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("num_bytes", [2.0**20, 2.0**50])
def test_memory_is_exact_to_a_byte(num_bytes: float, ring: bool) -> None:
    ends = np.array([True, not ring])
    may = dict.fromkeys(("may_be_first", "may_be_last"), ends) | {"may_close": ends & ring}
    problem = simple(
        2, 3, layer_bytes=np.array([num_bytes, 1.0, 1.0]), capacity_bytes=np.array([num_bytes, 1.0]), **may
    )
    with pytest.raises(InfeasiblePlanError, match="1 B short") as caught:
        solve_problem(problem)
    assert caught.value.missing_bytes == 1
    assert solve_problem(dataclasses.replace(problem, capacity_bytes=np.array([num_bytes + 1, 1.0])))


def test_a_tie_goes_to_the_nearer_device() -> None:
    hop_s = np.array([[0.0, 0.3, 0.1], [0.3, 0.0, 0.3], [0.1, 0.3, 0.0]])
    solution = solve_problem(simple(3, 2, hop_s=hop_s))
    assert solution.value == 1
    assert {span.device for span in solution.placement} == {0, 2}


def test_a_device_that_would_slow_the_others_down_is_left_out() -> None:
    speeds = np.array([1.0, 1.0, 50.0])
    solution = solve_problem(simple(3, 8, layer_s=speeds[:, None] * np.ones(8)))
    assert {span.device for span in solution.placement} == {0, 1}
    assert solution.value == 4


def test_a_ring_returns_to_the_one_trusted_device() -> None:
    only_a = np.array([True, False, False])
    problem = simple(3, 9, may_be_first=only_a, may_be_last=only_a, may_close=only_a)
    solution = solve_problem(problem)
    assert [span.device for span in solution.placement][::3] == [0, 0]
    assert solution.value == 3


@pytest.mark.parametrize(
    ("changes", "missing", "reason"),
    [
        ({"may_be_first": np.zeros(2, dtype=bool)}, 0, "may see token ids"),
        ({"may_be_last": np.zeros(2, dtype=bool)}, 0, "may see logits"),
        ({"capacity_bytes": np.array([30.0, 25.0])}, 25, "25 B short; tightest is"),
        ({"capacity_bytes": np.array([45.0, 39.0])}, 1, "'b' is 1 B short|'a' is .* short"),
        (
            {
                "may_be_first": np.array([True, False]),
                "may_be_last": np.array([False, True]),
                "num_front": 5,
                "num_back": 5,
            },
            0,
            "the permissions of 'a', 'b'",
        ),
    ],
)
def test_what_makes_it_infeasible_is_said(changes: dict[str, Any], missing: int, reason: str) -> None:
    with pytest.raises(InfeasiblePlanError, match=reason) as caught:
        solve_problem(simple(2, 8, **changes))
    assert caught.value.missing_bytes == missing


def test_a_limit_that_nothing_keeps_is_named() -> None:
    with pytest.raises(InfeasiblePlanError, match=r"max_bottleneck_s=0\.5"):
        solve_problem(simple(2, 8), "latency", max_bottleneck_s=0.5)


def test_links_that_join_too_little_are_named() -> None:
    with pytest.raises(InfeasiblePlanError, match="no links join devices that hold them all"):
        solve_problem(simple(2, 8, hop_s=np.full((2, 2), np.inf), capacity_bytes=np.array([50.0, 50.0])))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"objective": "speed"}, "must be one of 'throughput'"),
        ({"order": ()}, "must name devices"),
        ({"order": (0, 0)}, "each at most once"),
        ({"order": (0, 2)}, "devices 0 to 1"),
        ({"max_bottleneck_s": 0.0}, "positive"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        solve_problem(simple(2, 8), **arguments)


def test_energy_needs_every_power() -> None:
    with pytest.raises(ArgumentError, match="watts of 'b'"):
        solve_problem(simple(2, 8, watts=np.array([1.0, np.nan])), "energy")

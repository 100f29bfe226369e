"""Placements keep to forbidden cuts, and shortcuts cost what the link between both of their ends costs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings, strategies as st

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.placement.problem import Placement, Problem, Solution, device_bytes, latency_s
from lingualinked.planning.placement.solver import solve_problem
from lingualinked.workload import Objective
from placements import Judged, draw_problem, every_placement, with_transmission

SUMMED_DIFFERENTLY = 1e-9


@st.composite
def problems(draw: st.DrawFn, *, num_shortcuts: st.SearchStrategy[int], max_layers: int = 9) -> Problem:
    num_devices = draw(st.integers(1, 4))
    problem = draw_problem(
        draw(st.integers(0, 2**32)),
        draw(st.integers(2, max_layers if num_devices <= 3 else 6)),
        num_devices,
        whole=draw(st.booleans()),
        tight=draw(st.booleans()),
        gaps=draw(st.booleans()),
        rings=draw(st.booleans()),
        num_sessions=draw(st.sampled_from([1, 2, 5, math.inf])),
    )
    return with_transmission(
        problem,
        draw(st.integers(0, 2**32)),
        num_shortcuts=draw(num_shortcuts),
        num_cuts=draw(st.integers(0, 3)),
        alike=draw(st.booleans()),
    )


def solved(problem: Problem, objective: Objective) -> Solution | None:
    try:
        return solve_problem(problem, objective)
    except InfeasiblePlanError:
        return None


def judged(choices: list[Judged], placement: Placement) -> Judged:
    return next(each for each in choices if each.placement == placement)


def value_of(each: Judged, objective: Objective) -> float:
    return {"throughput": each.interval_s, "latency": each.latency_s, "energy": each.energy_j}[objective]


@given(problem=problems(num_shortcuts=st.just(0)), objective=st.sampled_from(["throughput", "latency", "energy"]))
def test_of_the_placements_without_a_forbidden_cut_the_best_is_found(problem: Problem, objective: Objective) -> None:
    solution, choices = solved(problem, objective), every_placement(problem)
    assert (solution is None) == (not choices)
    if solution is not None:
        assert not {span.start for span in solution.placement} & set(problem.forbidden_cuts)
        best = min(value_of(each, objective) for each in choices)
        assert solution.value == pytest.approx(best, rel=SUMMED_DIFFERENTLY)
        assert solution.lower_bound == solution.value


@given(problem=problems(num_shortcuts=st.integers(1, 4)), objective=st.sampled_from(["latency", "energy"]))
@settings(max_examples=200)
def test_shortcuts_in_sums_are_solved_exactly(problem: Problem, objective: Objective) -> None:
    solution, choices = solved(problem, objective), every_placement(problem)
    assert (solution is None) == (not choices)
    if solution is not None:
        chosen, best = judged(choices, solution.placement), min(value_of(each, objective) for each in choices)
        assert value_of(chosen, objective) == pytest.approx(solution.value, rel=SUMMED_DIFFERENTLY)
        assert solution.value == pytest.approx(best, rel=SUMMED_DIFFERENTLY)
        assert solution.lower_bound == solution.value


@given(problem=problems(num_shortcuts=st.integers(1, 4)))
@settings(max_examples=200)
def test_with_shortcuts_on_busy_links_the_bound_holds(problem: Problem) -> None:
    solution, choices = solved(problem, "throughput"), every_placement(problem)
    assert (solution is None) == (not choices)
    if solution is not None:
        chosen, best = judged(choices, solution.placement), min(each.interval_s for each in choices)
        assert chosen.interval_s == pytest.approx(solution.value, rel=SUMMED_DIFFERENTLY)
        assert chosen.latency_s == pytest.approx(latency_s(problem, solution.placement), rel=SUMMED_DIFFERENTLY)
        assert solution.lower_bound * (1 - SUMMED_DIFFERENTLY) <= best <= solution.value * (1 + SUMMED_DIFFERENTLY)
        for span in solution.placement:
            assert device_bytes(problem, solution.placement, span.device) <= problem.capacity_bytes[span.device]

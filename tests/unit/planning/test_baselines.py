"""Baselines use the devices as they come, and refuse what the solver would have to refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.placement.baselines import by_memory, even, sum_objective
from lingualinked.planning.placement.problem import Problem, bottleneck_s, latency_s
from lingualinked.planning.placement.solver import solve_problem
from random_problems import random_problem


def roomy(seed: int, num_layers: int, num_devices: int) -> Problem:
    problem = random_problem(seed, num_layers=num_layers, num_devices=num_devices)
    return dataclasses.replace(problem, capacity_bytes=problem.capacity_bytes + problem.layer_bytes.sum() * 4)


@given(seed=st.integers(0, 2**32), num_devices=st.integers(1, 8), more=st.integers(0, 20))
def test_shares_use_every_device_for_at_least_one_layer(seed: int, num_devices: int, more: int) -> None:
    problem = roomy(seed, num_devices + more, num_devices)
    for placement in (even(problem), by_memory(problem)):
        assert [span.device for span in placement] == list(range(num_devices))
        assert [span.start for span in placement] == [0, *(span.end for span in placement[:-1])]
        assert placement[-1].end == problem.num_layers
        assert all(span.end > span.start for span in placement)
    sizes = [span.end - span.start for span in even(problem)]
    assert max(sizes) - min(sizes) <= 1


def test_more_memory_means_more_layers() -> None:
    problem = dataclasses.replace(roomy(0, 12, 3), capacity_bytes=np.array([1e12, 2e12, 3e12]))
    assert [span.end - span.start for span in by_memory(problem)] == [2, 4, 6]


@given(seed=st.integers(0, 2**32))
def test_the_solver_is_never_worse(seed: int) -> None:
    problem = roomy(seed, 12, 4)
    best = solve_problem(problem).value
    for placement in (even(problem), by_memory(problem), sum_objective(problem)):
        assert best <= bottleneck_s(problem, placement) * (1 + 1e-9)  # sums formed in different orders
    assert latency_s(problem, sum_objective(problem)) <= latency_s(problem, even(problem)) * (1 + 1e-9)


def test_what_does_not_fit_is_refused() -> None:
    problem = roomy(1, 12, 3)
    cases = [
        ({"capacity_bytes": np.array([1e12, 1.0, 1e12])}, "exceed the memory of device 'd1'"),
        ({"may_be_first": np.array([False, True, True])}, "'d0' may not hold the first"),
    ]
    for changes, reason in cases:
        with pytest.raises(InfeasiblePlanError, match=reason):
            even(dataclasses.replace(problem, **changes))
    with pytest.raises(InfeasiblePlanError, match="use at most 12 devices"):
        even(roomy(1, 12, 13))

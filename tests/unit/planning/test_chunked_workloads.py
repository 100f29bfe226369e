"""Plans for prompts in chunks, which follow each other through the stages: predicted, simulated, and solved for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import lingualinked as ll
from profiles import profile

WORKLOAD = ll.Workload(prompt_tokens=1024, new_tokens=4, prefill_chunk_size=64)
NUM_LAYERS = 6


def measured(*slowdowns: float, latency_s: float = 1e-4, **fields: Any) -> ll.Profile:
    devices = [ll.Device(name=f"d{index}", slowdown=each, **fields) for index, each in enumerate(slowdowns)]
    return profile(*devices, num_layers=NUM_LAYERS, latency_s=latency_s)


def all_plans(made: ll.Profile, workload: ll.Workload) -> Iterator[ll.Plan]:
    """Every order of every choice of devices, cut everywhere."""
    for number in range(1, len(made.names) + 1):
        for names in itertools.permutations(made.names, number):
            for cuts in itertools.combinations(range(1, NUM_LAYERS), number - 1):
                bounds = itertools.pairwise([0, *cuts, NUM_LAYERS])
                spans = [(name, *bound) for name, bound in zip(names, bounds, strict=True)]
                yield ll.Plan.from_spans(spans, profile=made, workload=workload)


def test_one_session_gains_from_several_devices() -> None:
    made = measured(1.0, 1.0)
    whole = ll.solve(made, workload=dataclasses.replace(WORKLOAD, prefill_chunk_size=None))
    chunked = ll.solve(made, workload=WORKLOAD)
    assert (len(whole.devices), len(chunked.devices)) == (1, 2)
    assert chunked.predicted.first_token_s < 0.6 * whole.predicted.first_token_s
    assert "1,024 prompt (in chunks of 64)" in str(chunked.predicted)


@settings(max_examples=30)
@given(
    slowdowns=st.lists(st.sampled_from([1.0, 1.5, 3.0]), min_size=1, max_size=3),
    latency_s=st.sampled_from([0.0, 1e-3, 0.1]),
    size=st.sampled_from([None, 7, 64, 1000, 5000, "auto"]),
    prompt_tokens=st.sampled_from([1, 50, 1024]),
    bandwidth=st.sampled_from([None, "100Mbit/s"]),
)
def test_one_session_is_simulated_as_predicted(
    slowdowns: list[float], latency_s: float, size: Any, prompt_tokens: int, bandwidth: str | None
) -> None:
    workload = dataclasses.replace(WORKLOAD, prompt_tokens=prompt_tokens, prefill_chunk_size=size)
    made = measured(*slowdowns, latency_s=latency_s, bandwidth=bandwidth)
    bounds = itertools.pairwise([*range(len(slowdowns)), NUM_LAYERS])
    spans = [(name, *bound) for name, bound in zip(made.names, bounds, strict=True)]
    plan = ll.Plan.from_spans(spans, profile=made, workload=workload)
    simulated = ll.simulate(plan, num_requests=2)
    assert simulated.first_token_s.mean == pytest.approx(plan.predicted.first_token_s)
    assert simulated.request_s.mean == pytest.approx(plan.predicted.request_s)


def test_a_prediction_agrees_with_that_of_a_prompt_alone() -> None:
    plan = ll.Plan.from_spans([("d0", 0, 3), ("d1", 3, 6)], profile=measured(1.0, 1.0), workload=WORKLOAD)
    alone = plan.predict_prefill(1024, prefill_chunk_size=64)
    assert plan.predicted.first_token_s == pytest.approx(alone.first_token_s, rel=0.01)
    best = plan.predict(dataclasses.replace(WORKLOAD, prefill_chunk_size="auto"))
    assert best.workload.prefill_chunk_size == plan.predict_prefill(1024).prefill_chunk_size


def test_several_sessions_are_simulated_as_fast_as_the_bottleneck_allows() -> None:
    workload = dataclasses.replace(WORKLOAD, num_sessions=8)
    plan = ll.solve(measured(1.0, 2.0), workload=workload)
    simulated = ll.simulate(plan, num_requests=64)
    assert simulated.tokens_per_s == pytest.approx(plan.predicted.tokens_per_s, rel=0.1)


@pytest.mark.parametrize("num_sessions", [1, 3])
@pytest.mark.parametrize("new_tokens", [1, 64])
@pytest.mark.parametrize("size", [64, 300, "auto"])
@pytest.mark.parametrize("slowdowns", [(1.0, 1.0), (1.0, 2.0), (1.0, 1.0, 1.5)])
def test_no_placement_is_much_better_nor_below_the_bound(
    slowdowns: tuple[float, ...], size: Any, new_tokens: int, num_sessions: int
) -> None:
    made = measured(*slowdowns)
    workload = dataclasses.replace(WORKLOAD, new_tokens=new_tokens, num_sessions=num_sessions, prefill_chunk_size=size)
    plan = ll.solve(made, workload=workload)
    assert plan.solved is not None
    assert plan.solved.value == pytest.approx(plan.predicted.interval_s)
    best = min(each.predicted.interval_s for each in all_plans(made, workload))
    assert best <= plan.solved.value * (1 + 1e-9) <= 1.1 * best
    chosen = plan.predicted.workload  # the bound is that of these chunks
    for each in all_plans(made, chosen):
        assert each.predicted.interval_s >= plan.solved.lower_bound * (1 - 1e-9)


def test_the_least_latency_is_solved_for_too() -> None:
    made = measured(1.0, 1.0)
    plan = ll.solve(made, workload=WORKLOAD, objective="latency")
    assert plan.solved is not None
    assert len(plan.devices) == 2
    assert plan.solved.value == pytest.approx(plan.predicted.latency_s)
    assert plan.solved.lower_bound <= plan.solved.value
    assert ll.Plan.from_json(plan.to_json()) == plan

"""Chunks of a prompt follow each other through the stages, and their size balances what each costs against waiting."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

import lingualinked as ll
from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.planning.predicting import prefill_costs
from lingualinked.planning.prefill_prediction import StageCost, cost_of, predict_first_token_s, predict_prefill
from profiles import profile, times


def stage(fixed: float, per_token: float, growth: float = 0.0, **hop: float) -> StageCost:
    transfer_s = hop.pop("transfer", 0.0)
    cost = lambda tokens, context: fixed + per_token * tokens + growth * tokens * context  # noqa: E731
    return StageCost(cost, hop.pop("latency", 0.0), lambda tokens: transfer_s * tokens)


def test_stages_work_at_the_same_time() -> None:
    equal = [stage(0, 1)] * 3
    assert predict_first_token_s(equal, 0.5, 12, 12) == 3 * 12 + 0.5
    assert (
        predict_first_token_s(equal, 0.5, 12, 3) == 6 * 3 + 0.5
    )  # the last chunk leaves after four, and two stages follow
    assert predict_first_token_s(equal, 0.5, 11, 3) == 17 + 0.5  # the short one waits for those before it
    assert predict_first_token_s([stage(0, 1), stage(0, 2)], 0, 12, 4) == 4 + 24  # the slower one limits


def test_each_chunk_costs_something_of_its_own_and_more_behind_others() -> None:
    assert predict_first_token_s([stage(2, 1)], 0, 12, 4) == 3 * 2 + 12
    assert predict_first_token_s([stage(0, 1, 0.1)], 0, 12, 4) == pytest.approx(12 + 0.1 * 4 * (4 + 8))


def test_links_delay_each_chunk_and_carry_one_after_the_other() -> None:
    assert predict_first_token_s([stage(0, 1), stage(0, 1, latency=5)], 0, 12, 4) == 12 + 5 + 4
    assert predict_first_token_s([stage(0, 1), stage(0, 1, transfer=2)], 0, 12, 4) == 4 + 24 + 4


@given(
    prompt=st.integers(1, 5000),
    fixed=st.floats(0, 100),
    stages=st.integers(1, 6),
    size=st.integers(1, 5000),
)
def test_the_chosen_size_is_nearly_as_good_as_any(prompt: int, fixed: float, stages: int, size: int) -> None:
    costs = [stage(fixed, 1.0, 1e-4)] * stages
    chosen = predict_prefill(costs, 1.0, prompt, None)
    given_size = predict_prefill(costs, 1.0, prompt, size)
    assert chosen.first_token_s <= given_size.first_token_s * 1.25 + 32 * stages  # sizes are multiples of 32
    assert chosen.first_token_s <= chosen.whole_s
    assert given_size.prefill_chunk_size == min(size, prompt)


def test_chunks_are_long_where_each_costs_much_and_one_stage_needs_none() -> None:
    sizes = [predict_prefill([stage(fixed, 1)] * 2, 0, 4096, None).prefill_chunk_size for fixed in (1, 16, 256, 1e4)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (64, 4096)
    assert predict_prefill([stage(1, 1)], 0, 4096, None).prefill_chunk_size == 4096


def test_costs_are_those_of_a_profile() -> None:
    plan = ll.Plan.from_spans([("a", 0, 5), ("b", 5, 8)])
    (first, second), after_s = prefill_costs(plan.stages, profile(), 1)
    per_token = 1e-4
    assert first.compute_s(64, 0) == pytest.approx(5 * 64 * per_token)
    assert second.compute_s(64, 0) == pytest.approx(
        3 * 64 * 2 * per_token
    )  # the head, for the last token, comes after it
    assert after_s == pytest.approx(2 * 5e-4 + 1e-4)
    assert second.latency_s == pytest.approx(1e-4)


def test_a_plan_predicts_prompts() -> None:
    plan = ll.Plan.from_spans([("a", 0, 5), ("b", 5, 8)], profile=profile())
    chosen, whole = plan.predict_prefill(1024), plan.predict_prefill(1024, prefill_chunk_size=1024)
    assert chosen.first_token_s < 0.7 * chosen.whole_s == pytest.approx(0.7 * whole.first_token_s)
    assert plan.predict_prefill(1024, batch_size=4).whole_s == pytest.approx(4 * chosen.whole_s, rel=0.1)
    with pytest.raises(ll.ArgumentError, match="prefill_chunk_size=0 must be a positive integer"):
        plan.predict_prefill(1024, prefill_chunk_size=0)
    with pytest.raises(ll.ArgumentError, match="no profile"):
        ll.Plan.from_spans([("a", 0, 8)]).predict_prefill(10)


def test_costs_of_parts_add_up_and_grow_with_the_context() -> None:
    def measured(tokens: int, context: int, seconds: float) -> StepTime:
        return StepTime(rows=1, tokens=tokens, context=context, seconds=seconds)

    growing = ModuleTimes((measured(10, 0, 5.0), measured(10, 100, 6.0), measured(100, 0, 50.0)))
    cost = cost_of([(growing, 2), (times(1.0), 1)], 1)
    assert cost(10, 50) == pytest.approx(2 * 5.5 + times(1.0).seconds(1, 10, 50))
    assert cost(10, 5000) == pytest.approx(2 * (5.0 + 50.0) + times(1.0).seconds(1, 10, 50))


def test_a_prediction_is_said_in_words() -> None:
    predicted = predict_prefill([stage(0.01, 0.001)] * 2, 0.0, 1024, 128)
    assert (
        str(predicted)
        == "a prompt of 1,024 tokens in 8 chunks of up to 128: first token after 1.24 s, at once after 2.07 s"
    )
    assert str(predict_prefill([stage(0, 1)], 0.0, 1, None)) == "a prompt of 1 token at once: first token after 1.00 s"

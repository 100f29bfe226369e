"""What crosses boundaries counts in plans: it is predicted, simulated, kept on trusted devices, and shown."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import lingualinked as ll
from lingualinked.device import Device
from lingualinked.planning.plan_checks import check_trust
from lingualinked.planning.planner import baseline, solve
from lingualinked.planning.simulation.simulate import pipeline_times
from lingualinked.profile import Profile
from lingualinked.transmission import Shortcut, Transmission
from profiles import MIB, profile

WORKLOAD = ll.Workload(prompt_tokens=64, new_tokens=64)
PART = Shortcut(name="model.embed", made_at=0, used_at=(4, 9), token_bytes=4096, part_bytes=MIB)
SMALL = Shortcut(name="model.norm", made_at=0, used_at=(3, 7, 12), token_bytes=8192, part_bytes=1000)
IDS = Shortcut(name="input_ids", made_at=0, used_at=(5,), token_bytes=8)
SKIP = Shortcut(name="layer 2", made_at=2, used_at=(6, 12), token_bytes=2048)


def devices(*slowdowns: float, **fields: Any) -> list[Device]:
    return [ll.Device(name=f"d{index}", slowdown=each, **fields) for index, each in enumerate(slowdowns)]


def with_shortcuts(made: Profile, *shortcuts: Shortcut, cuts: tuple[int, ...] = (), everywhere: int = 0) -> Profile:
    transmission = Transmission(shortcuts=shortcuts, forbidden_cuts=cuts)
    prologue = made.model.prologue_bytes + sum(shortcut.part_bytes for shortcut in shortcuts)
    fields = {"transmission": transmission, "everywhere_bytes": everywhere, "prologue_bytes": prologue}
    model = dataclasses.replace(made.model, **fields)
    return dataclasses.replace(made, model=model)


def three(*shortcuts: Shortcut, **fields: Any) -> ll.Plan:
    made = with_shortcuts(profile(*devices(1, 1, 1, bandwidth="100Mbit/s"), num_layers=12), *shortcuts, **fields)
    return ll.Plan.from_spans([("d0", 0, 4), ("d1", 4, 8), ("d2", 8, 12)], profile=made, workload=WORKLOAD)


def test_each_stage_says_what_it_consumes_and_from_where() -> None:
    mapped = three(PART, IDS, SKIP, cuts=(2, 5)).transmission_map
    assert [[(each.name, each.source, each.token_bytes) for each in stage.consumed] for stage in mapped.stages] == [
        [("input_ids", None, 8)],
        [("hidden states", 0, 2048), ("model.embed", 0, 4096), ("input_ids", 0, 8), ("layer 2", 0, 2048)],
        [("hidden states", 1, 2048), ("model.embed", 0, 4096), ("layer 2", 0, 2048)],
    ]
    assert [stage.token_bytes for stage in mapped.stages] == [8, 8200, 8192]
    text = str(mapped)
    assert "model.embed" in text
    assert "no stage may begin at layers 2, 5" in text
    assert "<table" in mapped._repr_html_()


def test_a_shortcut_occupies_the_link_from_its_maker_to_its_user() -> None:
    plain, predicted = three().predicted, three(PART).predicted
    assert [(each.source, each.target, each.stage) for each in predicted.shortcuts] == [
        ("d0", "d1", 1),
        ("d0", "d2", 2),
    ]
    one_token_s = 4096 * 8 / 100e6
    assert predicted.shortcuts[0].decode_transfer_s == pytest.approx(one_token_s)
    assert predicted.step_s == pytest.approx(plain.step_s + 2 * one_token_s)
    assert predicted.first_token_s == pytest.approx(plain.first_token_s + 2 * 64 * one_token_s)
    times = pipeline_times(predicted)
    assert {"d0 -> d2"} < set(times.servers)
    assert times.step_s("decode") == pytest.approx(predicted.step_s)
    assert times.step_s("prefill") == pytest.approx(predicted.first_token_s)


@given(
    slowdowns=st.lists(st.sampled_from([1.0, 1.5, 3.0]), min_size=1, max_size=4),
    rate=st.sampled_from(["20Mbit/s", "1Gbit/s"]),
    shortcuts=st.sets(st.sampled_from([PART, SMALL, IDS, SKIP])),
    cuts=st.sets(st.integers(1, 11), max_size=4),
    objective=st.sampled_from(["throughput", "latency"]),
    num_sessions=st.sampled_from([1, 8]),
    memory=st.sampled_from([None, "70MiB"]),
    num_trusted=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_what_the_solver_promises_is_what_is_predicted(
    slowdowns: list[float],
    rate: str,
    shortcuts: set[Shortcut],
    cuts: set[int],
    objective: Any,
    num_sessions: int,
    memory: str | None,
    num_trusted: int,
) -> None:
    made = [
        dataclasses.replace(device, trusted=index < num_trusted, bandwidth=rate if index % 2 else None, memory=memory)
        for index, device in enumerate(devices(*slowdowns))
    ]
    given_profile = with_shortcuts(
        profile(*made, num_layers=12), *sorted(shortcuts, key=str), cuts=tuple(sorted(cuts)), everywhere=100
    )
    workload = dataclasses.replace(WORKLOAD, num_sessions=num_sessions)
    try:
        plan = solve(given_profile, workload=workload, objective=objective)
    except ll.InfeasiblePlanError:
        return
    assert plan.solved is not None
    predicted = plan.predicted.latency_s if objective == "latency" else plan.predicted.interval_s
    assert predicted == pytest.approx(plan.solved.value)
    assert plan.solved.lower_bound <= plan.solved.value * (1 + 1e-9)
    assert not {stage.start for stage in plan.stages} & cuts
    check_trust(plan, made, plan.measured.model.transmission)
    for use in plan.predicted.devices:
        assert use.left_bytes is None or use.left_bytes >= 0
    assert ll.Plan.from_json(plan.to_json()) == plan
    assert Profile.from_json(given_profile.to_json()) == given_profile


def test_a_part_is_held_where_that_takes_fewer_bytes_than_to_send_its_output() -> None:
    made = with_shortcuts(profile(*devices(1, 1, 1), num_layers=12), PART, SMALL)
    plan = solve(made, workload=WORKLOAD, num_sessions=32)  # in all, 128 tokens
    assert plan.held == ("model.norm",)
    many = solve(made, workload=ll.Workload(num_sessions=200))
    assert many.held == ("model.embed", "model.norm")
    for mapped, planned in zip(many.transmission_map.stages[1:], many.stages[1:], strict=True):
        assert [each.name for each in mapped.consumed] == ["hidden states", "input_ids"]
        assert planned.weight_bytes == made.model.span_bytes(planned.start, planned.end) + MIB + 1000
    assert many.stages[0].weight_bytes == made.model.span_bytes(0, many.stages[0].end)
    assert many.held_instead(made.model.transmission) == many.held
    assert solve(many.measured, workload=WORKLOAD).held == many.held  # once it is decided


def test_where_a_part_does_not_fit_everywhere_its_output_is_sent() -> None:
    large = dataclasses.replace(PART, part_bytes=45 * MIB, token_bytes=MIB)
    for memory, held in (("66MiB", ("model.embed",)), ("30MiB", ())):
        made = profile(ll.Device(name="a", memory="66MiB"), ll.Device(name="b", memory=memory), num_layers=20)
        layers = {"layer_weight_bytes": (MIB,) * 20, "prologue_bytes": MIB, "tied_bytes": 0}
        made = with_shortcuts(dataclasses.replace(made, model=dataclasses.replace(made.model, **layers)), large)
        plan = solve(made, workload=WORKLOAD)
        assert plan.held == held
        assert len(plan.stages) == 2


def test_what_shows_the_text_stays_on_trusted_devices_and_outputs_of_layers_need_not() -> None:
    mine = [ll.Device(name=name, trusted=True) for name in ("mine", "my other")]
    made = profile(*mine, ll.Device(name="theirs"), num_layers=12)
    spans = [("mine", 0, 4), ("theirs", 4, 8), ("my other", 8, 12)]
    for shortcut in (IDS, PART):
        needed = solve(with_shortcuts(made, shortcut), workload=ll.Workload(num_sessions=200))
        theirs = [range(stage.start, stage.end) for stage in needed.stages if stage.device == "theirs"]
        assert not any(layer in span for span in theirs for layer in shortcut.used_at)
        plan = ll.Plan.from_spans(spans, profile=with_shortcuts(made, shortcut))
        with pytest.raises(ll.InfeasiblePlanError, match=r"layers \[4, 8\) on device 'theirs', which is not trusted"):
            check_trust(plan, [each.device for each in made.devices], plan.measured.model.transmission)
    output = dataclasses.replace(PART, name="layer 0", part_bytes=0)
    check_trust(ll.Plan.from_spans(spans), [each.device for each in made.devices], Transmission(shortcuts=(output,)))


@pytest.mark.parametrize("kind", ["even", "by_memory", "sum_objective"])
def test_baselines_keep_to_forbidden_cuts(kind: str) -> None:
    plan = baseline(
        with_shortcuts(profile(*devices(1, 1, 1), num_layers=12), cuts=(3, 4, 5, 8)), kind, workload=WORKLOAD
    )
    assert not {stage.start for stage in plan.stages} & {3, 4, 5, 8}


def test_a_forbidden_cut_and_an_unknown_part_are_refused_by_name() -> None:
    with pytest.raises(ll.InfeasiblePlanError, match="begins a stage at layer 4, which must lie in the same stage as"):
        three(cuts=(4,))
    with pytest.raises(ll.InfeasiblePlanError, match=r"3 stages for a model whose layers .* at most 2 stages"):
        baseline(with_shortcuts(profile(*devices(1, 1, 1), num_layers=3), cuts=(2,)), "even")
    with pytest.raises(ll.InfeasiblePlanError, match=r"hold 'model\.lost', which is no part"):
        Transmission(shortcuts=(PART,)).holding(("model.lost",), 12)

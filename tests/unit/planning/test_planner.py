"""From a profile to a plan: what is solved, what is predicted, what is refused and with which remedy."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import subprocess
import sys
from typing import Any

import pytest
from scipy import optimize

import lingualinked as ll
from lingualinked.link_profile import LinkProfile
from lingualinked.planning.left_out import sessions_to_pay
from lingualinked.planning.planner import solve
from lingualinked.planning.workload_costs import kv_capacity
from profiles import MIB, profile

WORKLOAD = ll.Workload(prompt_tokens=64, new_tokens=64)
FULL = dataclasses.replace(WORKLOAD, num_sessions=16)  # more sessions than it takes to keep every device busy


def devices(*slowdowns: float, **fields: Any) -> list[ll.Device]:
    return [ll.Device(name=f"d{index}", slowdown=each, **fields) for index, each in enumerate(slowdowns)]


def test_faster_devices_get_more_layers() -> None:
    plan = solve(profile(*devices(1.0, 3.0), num_layers=12), workload=FULL)
    layers = {stage.device: stage.num_layers for stage in plan.stages}
    assert layers["d0"] > 2 * layers["d1"]
    assert plan.solved is not None
    assert plan.solved.lower_bound <= plan.solved.value * (1 + 1e-9)
    assert plan.predicted.bottleneck_s == pytest.approx(plan.solved.value)


@pytest.mark.parametrize(("num_sessions", "used"), [(1, 1), (2, 2), (16, 3)])
def test_throughput_uses_as_many_devices_as_the_sessions_keep_busy(num_sessions: int, used: int) -> None:
    workload = dataclasses.replace(WORKLOAD, num_sessions=num_sessions)
    made = profile(*devices(1.0, 1.5, 2.0), num_layers=12, latency_s=1e-3)
    throughput, latency = (solve(made, workload=workload, objective=each) for each in ("throughput", "latency"))
    assert len(throughput.stages) == used
    assert latency.devices == ("d0",)
    assert latency.solved is not None
    assert latency.solved.unused == ("d1", "d2")
    assert latency.predicted.latency_s == pytest.approx(latency.solved.value)
    assert throughput.solved is not None
    assert throughput.predicted.interval_s == pytest.approx(throughput.solved.value)
    assert throughput.predicted.tokens_per_s == pytest.approx(1 / throughput.solved.value)
    spread = ll.Plan.from_spans([("d0", 0, 5), ("d1", 5, 9), ("d2", 9, 12)], profile=made, workload=workload)
    for other in (latency, spread):
        assert throughput.predicted.tokens_per_s >= other.predicted.tokens_per_s


@pytest.mark.parametrize(
    ("slowdowns", "hop_s", "used"),
    [
        ((1.0, 1.0), 1e-4, 2),  # hardly any delay, and twice the rate
        ((1.0, 1.0, 1.0, 1.0), 1e-4, 4),
        ((1.0, 1.0), 1e-1, 1),  # hops that delay one session
        ((1.0, 4.0), 1e-4, 1),  # a device that delays one session
        ((1.0, 1.0, 4.0), 1e-4, 2),
    ],
)
def test_without_a_workload_devices_are_used_that_hardly_delay_one_session(
    slowdowns: tuple[float, ...], hop_s: float, used: int
) -> None:
    made = profile(*devices(*slowdowns), num_layers=12, latency_s=hop_s)
    plan, quickest = solve(made), solve(made, workload=ll.Workload())
    assert len(plan.devices) == used
    assert len(quickest.devices) == 1
    assert plan.predicted.latency_s <= 1.1 * quickest.predicted.latency_s
    assert plan.workload == ll.Workload()
    named = solve(made, workload=ll.Workload(), num_sessions="any")
    assert (named.spans, named.solved) == (plan.spans, plan.solved)
    assert solve(made, objective="latency").spans == quickest.spans


def test_energy_keeps_to_the_floor() -> None:
    hungry = ll.Device(name="hungry", watts=100.0)
    frugal = ll.Device(name="frugal", slowdown=4.0, watts=5.0)
    made = profile(hungry, frugal)
    free = solve(made, workload=WORKLOAD, objective="energy")
    assert free.devices == ("frugal",)
    assert free.solved is not None
    assert free.predicted.joules_per_token == pytest.approx(free.solved.value)
    floor = 2 * free.predicted.pipeline_tokens_per_s
    bound = solve(made, workload=WORKLOAD, objective="energy", min_tokens_per_s=floor)
    assert bound.predicted.pipeline_tokens_per_s >= floor * (1 - 1e-9)
    assert bound.solved is not None
    assert bound.solved.value > free.solved.value


def drawing(made: ll.Profile, **watts: float) -> ll.Profile:
    """A profile of devices of which some were measured to draw so much, and the others could not be."""
    return dataclasses.replace(
        made,
        devices=tuple(
            dataclasses.replace(each, measured_watts=watts[each.device.name], power_source="RAPL")
            if each.device.name in watts
            else dataclasses.replace(each, power_source="no counter")
            for each in made.devices
        ),
    )


def test_measured_power_stands_in_for_what_is_not_given() -> None:
    hungry, frugal = ll.Device(name="hungry"), ll.Device(name="frugal", slowdown=4.0, watts=5.0)
    made = drawing(profile(hungry, frugal), hungry=100.0, frugal=1e6)  # what is given counts
    given = profile(dataclasses.replace(hungry, watts=100.0), frugal)
    plans = [solve(each, workload=WORKLOAD, objective="energy") for each in (made, given)]
    assert plans[0].stages == plans[1].stages
    assert plans[0].predicted.joules_per_token == plans[1].predicted.joules_per_token
    assert "Power while computing: hungry 100 W (measured: RAPL), frugal 5 W (given)" in str(made)
    assert ll.Profile.from_json(made.to_json()) == made


def test_power_that_could_not_be_measured_is_asked_for_with_the_reason() -> None:
    with pytest.raises(ll.ArgumentError, match=r"needs watts= of device 'b', whose power was not measured: no counter"):
        solve(drawing(profile(), a=3.0), objective="energy")
    for watts in (0.0, math.nan, math.inf):
        with pytest.raises(ll.ArgumentError, match=r"measured_watts=.* of device 'a' must be positive and finite"):
            drawing(profile(), a=watts)


def test_memory_holds_weights_kv_and_working_memory_under_the_reserve() -> None:
    made = profile(*devices(1.0, 2.0, memory="80MiB"), num_layers=8)
    plan = solve(made, workload=WORKLOAD, reserve=0.1)
    for use in plan.predicted.devices:
        assert use.used_bytes <= 0.9 * 80 * MIB
        assert use.left_bytes is not None
        assert use.left_bytes >= 0.1 * 80 * MIB
    stage = plan.predicted.stages[0]
    assert stage.weight_bytes == made.model.span_bytes(stage.start, stage.end)
    assert stage.kv_bytes == stage_layers(plan, 0) * 1024 * kv_capacity(WORKLOAD, None)


def test_a_state_takes_memory_however_long_the_text_is() -> None:
    made = profile(*devices(1.0, 1.0), num_layers=8)
    kept = dataclasses.replace(made.model, layer_kv_bytes=(0,) * 8, layer_state_bytes=(0, 5000) * 4)
    made = dataclasses.replace(made, model=kept)
    for num_tokens in (16, 1600):
        workload = ll.Workload(prompt_tokens=num_tokens, new_tokens=16, batch_size=3, num_sessions=2)
        assert sum(stage.kv_bytes for stage in solve(made, workload=workload).predicted.stages) == 4 * 5000 * 6
    with pytest.raises(ll.ArgumentError, match="layer_state_bytes of a model profile has 1 value for 8 layers"):
        dataclasses.replace(kept, layer_state_bytes=(1,))


def stage_layers(plan: ll.Plan, index: int) -> int:
    return plan.stages[index].num_layers


@pytest.mark.parametrize(
    ("workload", "window", "capacity"),
    [
        (ll.Workload(prompt_tokens=64, new_tokens=1), None, 128),
        (ll.Workload(prompt_tokens=100, new_tokens=28), None, 128),
        (ll.Workload(prompt_tokens=100, new_tokens=29), None, 192),
        (ll.Workload(prompt_tokens=1000, new_tokens=1000), None, 2048),
        (ll.Workload(prompt_tokens=8000, new_tokens=192), None, 8192),
        (ll.Workload(prompt_tokens=1000, new_tokens=1000), 64, 128),
        (ll.Workload(prompt_tokens=1000, new_tokens=10), 500, 512),
    ],
)
def test_kv_is_planned_as_its_buffers_grow(workload: ll.Workload, window: int | None, capacity: int) -> None:
    assert kv_capacity(workload, window) == capacity


def test_only_trusted_devices_hold_the_ends() -> None:
    trusted = ll.Device(name="mine", slowdown=2.0, trusted=True)
    made = profile(*devices(1.0, 1.0), trusted, num_layers=12)
    plan = solve(made, workload=FULL)
    assert plan.stages[0].device == plan.stages[-1].device == "mine"
    assert set(plan.devices) == {"mine", "d0", "d1"}
    use = next(each for each in plan.predicted.devices if each.device == "mine")
    spans = [made.model.span_bytes(stage.start, stage.end) for stage in plan.stages if stage.device == "mine"]
    working = sum(stage.working_bytes + stage.kv_bytes for stage in plan.predicted.stages if stage.device == "mine")
    assert use.used_bytes == sum(spans) + working - made.model.tied_bytes


def test_the_order_may_be_fixed() -> None:
    made = profile(*devices(1.0, 1.0, 1.0), num_layers=12)
    assert solve(made, workload=FULL, order=["d2", "d0", "d1"]).devices == ("d2", "d0", "d1")
    with pytest.raises(ll.ArgumentError, match="no device 'moon'"):
        solve(made, order=["moon"])
    with pytest.raises(ll.ArgumentError, match="'d0' twice"):
        solve(made, order=["d0", "d0"])


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    made = profile(*devices(1.0, 1.0, memory="30MiB"), num_layers=8)
    with pytest.raises(
        ll.InfeasiblePlanError, match=r"what would fit: .*one more device of at least \d+\.\d+ MiB"
    ) as caught:
        solve(made, workload=WORKLOAD)
    assert caught.value.missing_bytes > 0
    long = ll.Workload(prompt_tokens=64, new_tokens=960, batch_size=8, num_sessions=2)
    roomy = profile(*devices(1.0, 1.0, memory="70MiB"), num_layers=8)
    with pytest.raises(
        ll.InfeasiblePlanError, match=r"texts of \d+ tokens instead of 1024.*batch_size=\d instead of 8"
    ):
        solve(roomy, workload=long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "speed"}, "objective='speed' must be one of 'throughput'"),
        ({"objective": "energy"}, 'objective="energy" needs watts= of device'),
        ({"workload": 3}, "workload is a int"),
        ({"reserve": 1.0}, "reserve=1.0"),
        ({"reserve": -0.1}, "reserve=-0.1"),
        ({"reserve": math.nan}, "reserve=nan"),
        ({"min_tokens_per_s": 0}, "min_tokens_per_s=0"),
        ({"min_tokens_per_s": math.nan}, "min_tokens_per_s=nan"),
        ({"order": []}, "order is empty"),
        ({"order": 3}, "order=3 must be a list"),
        ({"order": [["a"]]}, r"order=\[\['a'\]\] must be a list of device names"),
        ({"num_sessions": 10**400}, "num_sessions=1000"),
        ({"min_tokens_per_s": 10**400}, "min_tokens_per_s=1000"),
    ],
)
def test_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ArgumentError, match=message):
        solve(profile(), **arguments)
    with pytest.raises(ll.ArgumentError, match="profile is a str"):
        solve("profile")  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["throughput", "latency", "energy"])
@pytest.mark.parametrize(
    "fields", [{"latency": 1e300}, {"bandwidth": 5e-324}, {"slowdown": 1e300}, {"watts": 1e300}], ids=str
)
def test_what_would_overflow_is_refused_by_name(fields: dict[str, Any], objective: ll.Objective) -> None:
    made = profile(ll.Device(name="a", watts=1.0), ll.Device(name="odd", **({"watts": 1.0} | fields)))
    with pytest.raises(ll.ArgumentError, match="of device 'odd' are"):
        solve(made, workload=WORKLOAD, objective=objective)


def test_a_profile_is_planned_with_or_refused_whatever_number_it_holds() -> None:
    text = profile(ll.Device(name="a", watts=1.0, memory="80MiB"), ll.Device(name="b", watts=2.0)).to_json()
    for place in {each[1]: each for each in re.finditer(r'("\w+": )(-?[\d.e+-]+|null)', text)}.values():
        for value in ("-1", "0", "1e300", "1e400", f"1{'0' * 400}", "null"):
            changed = f"{text[: place.start(2)]}{value}{text[place.end(2) :]}"
            with contextlib.suppress(ll.ArgumentError, ll.InfeasiblePlanError):
                plan = solve(ll.Profile.from_json(changed), workload=WORKLOAD, objective="energy")
                assert plan.solved is not None
                assert 0 <= plan.solved.value < math.inf


def test_a_floor_that_can_not_be_had_is_refused_with_what_can() -> None:
    with pytest.raises(ll.InfeasiblePlanError, match=r"no plan gives min_tokens_per_s=1e\+06: the fastest gives \d"):
        solve(profile(), workload=WORKLOAD, min_tokens_per_s=1e6)


def test_wrong_types_are_refused_by_name() -> None:
    plan = solve(profile(), workload=WORKLOAD)
    with pytest.raises(ll.ArgumentError, match="plan is a NoneType"):
        ll.simulate(None)  # type: ignore[arg-type]
    with pytest.raises(ll.ArgumentError, match="workload is a int"):
        ll.simulate(plan, 3)  # type: ignore[arg-type]
    with pytest.raises(ll.ArgumentError, match="workload is a int"):
        plan.predict(3)  # type: ignore[arg-type]
    with pytest.raises(ll.ArgumentError, match="a int can't be compared"):
        plan.compare(3)  # type: ignore[arg-type]
    with pytest.raises(ll.ArgumentError, match="figure='stages' is not a number"):
        plan.compare(plan).ratios("stages")
    with pytest.raises(ll.ArgumentError, match="reserve=7"):
        dataclasses.replace(plan, reserve=7)
    with pytest.raises(ll.ArgumentError, match="a size of a model profile is -1"):
        dataclasses.replace(profile().model, prologue_bytes=-1)
    with pytest.raises(ll.ArgumentError, match="layer_kv_bytes of a model profile has 1 value for 8 layers"):
        dataclasses.replace(profile().model, layer_kv_bytes=(1,))


def test_without_linprog_nothing_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no linprog")

    monkeypatch.setattr(optimize, "linprog", refuse)
    with pytest.raises(RuntimeError, match="no linprog"):
        solve(profile())


def test_a_plan_survives_json_with_its_profile() -> None:
    plan = solve(profile(), workload=WORKLOAD)
    assert ll.Plan.from_json(plan.to_json()) == plan


def test_a_plan_by_hand_is_predicted_from_a_profile_that_is_given() -> None:
    made = profile()
    plan = ll.Plan.from_spans([("b", 0, 4), ("a", 4, 8)], profile=made, workload=WORKLOAD)
    assert [stage.weight_bytes for stage in plan.stages] == [made.model.span_bytes(0, 4), made.model.span_bytes(4, 8)]
    assert plan.predicted.step_s > solve(made, workload=WORKLOAD, objective="latency").predicted.step_s
    bare = ll.Plan.from_spans([("b", 0, 4), ("a", 4, 8)])
    with pytest.raises(ll.ArgumentError, match="the plan has no profile to predict from"):
        _ = bare.predicted
    with pytest.raises(ll.InfeasiblePlanError, match="the model has 8"):
        ll.Plan.from_spans([("a", 0, 4)], profile=made)


@pytest.mark.parametrize("kind", ["even", "by_memory", "sum_objective"])
def test_baselines_are_never_better(kind: str) -> None:
    made = profile(*devices(1.0, 2.0, 5.0, memory="200MiB"), num_layers=12)
    other = ll.baseline(made, kind, workload=WORKLOAD)
    assert other.predicted.interval_s >= solve(made, workload=WORKLOAD).predicted.interval_s * (1 - 1e-9)
    with pytest.raises(ll.ArgumentError, match="kind='odd' must be one of"):
        ll.baseline(made, "odd")


def test_the_prediction_adds_up() -> None:
    workload = ll.Workload(prompt_tokens=64, new_tokens=3, batch_size=4, num_sessions=2)
    slow = ll.Device(name="slow", slowdown=2.0, bandwidth=1e6, latency=0.25)
    plan = ll.Plan.from_spans(
        [("a", 0, 5), ("slow", 5, 8)], profile=profile(ll.Device(name="a"), slow), workload=workload
    )
    predicted = plan.predicted
    assert [(hop.source, hop.target) for hop in predicted.hops] == [("caller", "a"), ("a", "slow"), ("slow", "caller")]
    between = predicted.hops[1]
    assert between.latency_s == pytest.approx(0.25 + 1e-4)
    assert between.decode_transfer_s == pytest.approx((4 * 2048 + 160) / 1e6)
    assert between.prefill_transfer_s == pytest.approx((4 * 64 * 2048 + 160) / 1e6)
    assert predicted.request_s == pytest.approx(predicted.first_token_s + 2 * predicted.step_s)
    assert predicted.stream_tokens_per_s == pytest.approx(12 / predicted.request_s)
    assert predicted.tokens_per_s == pytest.approx(min(2 * predicted.stream_tokens_per_s, 4 / predicted.bottleneck_s))
    assert predicted.bottleneck == "link 'a' -> 'slow'"
    assert predicted.joules_per_token is None
    figures = predicted.to_dict()
    assert figures["bottleneck"] == predicted.bottleneck
    assert figures["stages"][0]["device"] == "a"


def test_a_simulation_of_a_plan_agrees_with_its_prediction() -> None:
    plan = solve(profile(*devices(1.0, 2.0, 3.0), num_layers=12), workload=FULL)
    alone = ll.simulate(plan, num_requests=1)
    assert alone.makespan_s == pytest.approx(plan.predicted.request_s)
    full = ll.simulate(plan, FULL, num_requests=36)
    assert full.tokens_per_s == pytest.approx(plan.predicted.pipeline_tokens_per_s, rel=0.05)  # filling and draining
    assert full.bottleneck in plan.predicted.bottleneck


def test_plans_are_compared_under_one_workload() -> None:
    made = profile(*devices(1.0, 2.0), num_layers=8)
    solved, even = solve(made, workload=FULL), ll.Plan.from_spans([("d0", 0, 4), ("d1", 4, 8)])
    comparison = solved.compare(even, names=["solved", "even"])
    assert comparison.ratios("pipeline_tokens_per_s")[1] < 1
    assert "even" in str(comparison)
    assert "<table" in comparison._repr_html_()
    assert set(comparison.to_dict()) == {"solved", "even"}
    with pytest.raises(ll.ArgumentError, match="for 2 plans"):
        solved.compare(even, names=["one"])
    with pytest.raises(ll.ArgumentError, match="4 layers can't be compared with one of 8"):
        solved.compare(ll.Plan.from_spans([("d0", 0, 4)]))


def test_an_explanation_names_the_bottleneck_and_what_helps() -> None:
    plan = solve(profile(*devices(1.0, 1.0), num_layers=12), workload=FULL)
    explanation = plan.explain()
    assert "The speed of device" in explanation.limit
    assert explanation.another_device.gain > 1.2
    assert explanation.what_ifs[0].gain >= explanation.what_ifs[-1].gain
    assert "Another device will help" in str(explanation)
    slow_link = profile(*devices(1.0, 1.0, bandwidth=1e9), num_layers=12)
    narrow = LinkProfile(source="d0", target="d1", latency_s=0.0, bandwidth_bytes_per_s=1e4)
    links = tuple(narrow if (each.source, each.target) == ("d0", "d1") else each for each in slow_link.links)
    slow_link = dataclasses.replace(slow_link, links=links)
    text = str(ll.Plan.from_spans([("d0", 0, 6), ("d1", 6, 12)], profile=slow_link, workload=FULL).explain())
    assert "The link 'd0' -> 'd1' limits it" in text


def test_an_explanation_says_when_another_device_does_not_help() -> None:
    made = profile(*devices(1.0), num_layers=4, latency_s=1.0)
    text = str(solve(made, workload=WORKLOAD, objective="latency").explain())
    assert "Another device will not help" in text
    assert "A step computes for" in text


def test_full_memory_is_named() -> None:
    tight = ll.Device(name="tight", memory="42MiB")
    made = profile(tight, ll.Device(name="slow", slowdown=8.0), num_layers=8)
    plan = solve(made, workload=WORKLOAD)
    explanation = plan.explain()
    assert "The memory of 'tight' is full" in explanation.limit
    assert any(each.change == "'tight' with twice the memory" and each.gain > 1.2 for each in explanation.what_ifs)


def test_a_plan_shows_itself() -> None:
    plan = solve(profile(*devices(1.0, 2.0, memory="400MiB"), num_layers=8), workload=WORKLOAD)
    for text in (str(plan), plan._repr_html_()):
        assert "gap" in text
        assert "tokens/s" in text
        assert "d0" in text
    figure = plan.plot()
    assert [axes.get_title() for axes in figure.axes] == [
        "layers",
        "memory",
        "time",
    ]
    assert plan.predicted.limited_by in figure.get_suptitle()
    assert len(ll.Plan.from_spans([("a", 0, 2)]).plot().axes) == 1


def test_planning_loads_neither_torch_nor_zmq() -> None:
    code = """
import sys
sys.path.insert(0, "tests")
import lingualinked as ll
from profiles import profile
plan = ll.solve(profile())
plan.explain(), str(plan), plan.plot(), ll.simulate(plan), ll.Plan.from_json(plan.to_json())
print(*({"torch", "transformers", "zmq"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_like_devices_are_used_in_the_order_in_which_they_are_listed() -> None:
    made = profile(*devices(1.0, 1.0, 1.0, 1.0), num_layers=9)
    assert solve(made, workload=FULL).devices == ("d0", "d1", "d2", "d3")
    alone = solve(profile(*devices(1.0, 1.0, 1.0), latency_s=1.0), workload=FULL, objective="latency")
    assert alone.devices == ("d0",)
    mixed = solve(profile(*devices(3.0, 1.0, 3.0), num_layers=12), workload=FULL).devices
    assert mixed.index("d0") < mixed.index("d2")


def test_like_devices_behind_unlike_links_stay_where_they_are() -> None:
    made = profile(*devices(1.0, 1.0, 1.0), num_layers=9)
    far = LinkProfile(source="d0", target="d1", latency_s=5.0, bandwidth_bytes_per_s=None)
    links = tuple(far if (each.source, each.target) == ("d0", "d1") else each for each in made.links)
    plan = solve(dataclasses.replace(made, links=links), workload=FULL)
    assert len(plan.stages) == 3
    assert plan.predicted.step_s < 1


def trust(*names: str, num_layers: int = 12, **fields: Any) -> Any:
    made = [ll.Device(name=name, trusted=name.startswith("mine"), **fields) for name in names]
    return profile(*made, num_layers=num_layers)


@pytest.mark.parametrize("kept", [(0, 0), (3, 0), (0, 4), (2, 3), (12, 12), (99, 0)])
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_so_many_layers_at_each_end_stay_on_trusted_devices(kept: tuple[int, int], objective: Any) -> None:
    made = trust("mine", "theirs", "others")
    workload = dataclasses.replace(FULL, trusted_layers=kept)
    plan = solve(made, workload=workload, objective=objective)
    assert plan.trusted_layers == kept
    front, back = max(1, kept[0]), 12 - max(1, kept[1])
    for stage in plan.stages:
        assert stage.device == "mine" or (stage.start >= front and stage.end <= back)
    if objective == "throughput" and front < back - 1:
        assert len(plan.devices) == 3
    assert ll.Plan.from_json(plan.to_json()) == plan
    changed = plan.explain()  # solves changed problems under the same rule
    assert changed.tokens_per_s > 0


def test_trusted_layers_without_a_trusted_device_are_refused() -> None:
    workload = dataclasses.replace(WORKLOAD, trusted_layers=(2, 0))
    with pytest.raises(ll.ArgumentError, match=r"trusted_layers=\(2, 0\) of the workload has no effect"):
        solve(profile(*devices(1.0, 1.0)), workload=workload)


def test_fewer_trusted_layers_are_a_remedy() -> None:
    mine = ll.Device(name="mine", trusted=True, memory="80MiB")
    made = profile(mine, ll.Device(name="theirs"), num_layers=12)
    with pytest.raises(ll.InfeasiblePlanError, match=r"trusted_layers=\((2|3), (2|3)\) instead of \(5, 5\)") as caught:
        solve(made, workload=dataclasses.replace(WORKLOAD, trusted_layers=(5, 5)))
    assert caught.value.missing_bytes > 0


def test_a_plan_says_from_how_many_sessions_on_what_it_leaves_out_would_pay() -> None:
    made = profile(*devices(1.0, 4.0, 6.0, 600.0), num_layers=24)
    plan = solve(made, workload=WORKLOAD)
    found = sessions_to_pay(plan)
    assert found["d3"] is None
    for name in ("d1", "d2"):
        used = [name in solve(made, workload=WORKLOAD, num_sessions=number).devices for number in range(1, 9)]
        assert found[name] == 1 + used.index(True)
        assert f"{name} (would pay from {found[name]} sessions in flight on)" in str(plan).replace("\n", " ")
    assert "d3 (would not pay, however many sessions are in flight)" in str(plan).replace("\n", " ")
    assert sessions_to_pay(solve(made, workload=FULL)) == {"d3": None}


def test_a_plan_says_what_limits_it() -> None:
    made = profile(*devices(1.0, 4.0), num_layers=12, latency_s=0.5)
    spread = [("d0", 0, 11), ("d1", 11, 12)]
    alone = ll.Plan.from_spans(spread, profile=made, workload=WORKLOAD)
    assert alone.predicted.limited_by.startswith("link")
    assert "can't keep every device busy" in alone.explain().limit
    full = ll.Plan.from_spans(spread, profile=made, workload=dataclasses.replace(WORKLOAD, num_sessions=500))
    assert full.predicted.limited_by == full.predicted.bottleneck == "device 'd0'"
    assert full.explain().limit.startswith("The speed of device 'd0' limits it")
    for plan in (alone, full):
        assert f"limited by {plan.predicted.limited_by}" in str(plan).replace("\n", " ")


@pytest.mark.parametrize(("num_sessions", "said"), [(1, 1), (2, 2), (16, 1)])
def test_an_explanation_says_when_fewer_devices_would_be_faster(num_sessions: int, said: int) -> None:
    made = profile(*devices(1.0, 4.0, 6.0), num_layers=12)
    workload = dataclasses.replace(WORKLOAD, num_sessions=num_sessions)
    plan = ll.Plan.from_spans([("d0", 0, 4), ("d1", 4, 8), ("d2", 8, 12)], profile=made, workload=workload)
    sentence = plan.explain().fewer_devices
    if num_sessions == 16:
        plan = solve(made, workload=workload)
        sentence = plan.explain().fewer_devices
    assert sentence.startswith(f"With {said} session")
    assert "fewer devices would be faster: 'd0'" in sentence
    assert sentence in str(plan.explain())
    assert solve(made, workload=WORKLOAD).explain().fewer_devices == ""

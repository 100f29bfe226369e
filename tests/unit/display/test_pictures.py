"""Pictures have a title and a legend, each colour has one meaning, and a long run draws as few things as a short one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

import lingualinked as ll
from histories import recorded
from lingualinked.display.palette import DEVICES, FAILED, KV, LIMITING, PLAIN, WEIGHTS, WORKING
from profiles import profile

DEVICES_OF_PLAN = [ll.Device(name=name, memory="60MiB") for name in ("laptop", "phone", "nas")]


def planned() -> ll.Plan:
    return ll.solve(profile(*DEVICES_OF_PLAN), workload=ll.Workload(num_sessions=4))


def telemetry(num_steps: int) -> ll.Telemetry:
    stages = tuple(
        ll.StageSnapshot(
            device=device.name,
            start=index,
            end=index + 1,
            weight_bytes=2**20,
            kv_bytes=2**10,
            num_sessions=1,
            num_steps=1,
            compute_s=0.1,
            sent_bytes=1,
        )
        for index, device in enumerate(DEVICES_OF_PLAN)
    )
    history = recorded(num_steps) if num_steps else ll.Telemetry(stages=(), workers=()).history
    return ll.Telemetry(stages=stages, workers=(), history=history)


def simulated(num_requests: int) -> ll.Simulation:
    workload = ll.Workload(num_sessions=4, prompt_tokens=64, new_tokens=100)
    return ll.simulate(planned(), num_requests=num_requests, workload=workload, keep_events=1_000_000)


def colours(axes: Any) -> set[str]:
    return {to_hex(patch.get_facecolor()) for patch in axes.patches}


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


PICTURES = {
    "plan": planned,
    "plan without a profile": lambda: ll.Plan.from_spans([("a", 0, 2)]),
    "stages": lambda: telemetry(0),
    "history": lambda: telemetry(50),
    "simulation": lambda: simulated(2),
    "long simulation": lambda: simulated(40),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_has_a_title(name: str) -> None:
    assert PICTURES[name]().plot().get_suptitle()


def test_in_a_plan_a_colour_has_one_meaning() -> None:
    plan = planned()
    layers, memory, time = plan.plot().axes
    assert colours(layers) == {PLAIN}
    assert colours(memory) == {WEIGHTS, KV, WORKING}
    assert colours(time) == {PLAIN, LIMITING}
    assert sorted(legend(memory)) == ["KV cache", "limit", "weights", "working"]
    assert legend(time) == [f"{plan.predicted.limited_by} limits"]


def test_in_a_history_a_colour_has_one_meaning() -> None:
    assert FAILED not in DEVICES
    figure = telemetry(800).plot()
    assert legend(figure.axes[0]) == ["laptop", "phone", "nas"]
    assert legend(figure.axes[-1]) == ["layers are being moved", "a new plan is in force"]


@pytest.mark.parametrize("num_steps", [300, 10_000])
def test_a_long_history_draws_few_points(num_steps: int) -> None:
    figure = telemetry(num_steps).plot()
    assert f"{num_steps:,} steps" in figure.get_suptitle()
    assert all(len(line.get_xdata()) <= 200 for axes in figure.axes for line in axes.lines)


def test_a_long_simulation_is_binned() -> None:
    simulation = simulated(100)
    assert len(simulation.intervals) == 70_000
    chart, _ = simulation.plot().axes
    assert not chart.collections
    assert not chart.texts
    assert len(chart.patches) <= 2 * len(simulation.utilisation)
    assert "full height is 100 % of each" in chart.get_title(loc="left")
    filled_s = 0.0
    for patch in chart.patches:
        top, edges, baseline = patch.get_data()
        shares = (baseline - top) / 0.72
        assert -1e-9 <= shares.min() <= shares.max() <= 1 + 1e-9
        filled_s += (shares * np.diff(edges)).sum()
    busy_s = sum(simulation.utilisation.values()) * simulation.makespan_s
    assert filled_s == pytest.approx(busy_s, rel=0.01)


def test_a_short_simulation_shows_each_visit() -> None:
    simulation = ll.simulate(
        planned(), num_requests=2, workload=ll.Workload(num_sessions=2, prompt_tokens=16, new_tokens=4)
    )
    chart, _ = simulation.plot().axes
    assert sum(len(each.get_paths()) for each in chart.collections) == len(simulation.intervals)

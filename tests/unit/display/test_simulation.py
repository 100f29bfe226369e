"""A simulation is drawn as text, as HTML and as a picture."""

from __future__ import annotations

import json

import pytest

from lingualinked.planning.simulation.line import PipelineTimes, Visit
from lingualinked.planning.simulation.result import Simulation
from lingualinked.planning.simulation.simulate import simulate_times
from lingualinked.workload import Workload


def simulation(num_servers: int = 3, *, new_tokens: int = 4, keep_events: int = 2000) -> Simulation:
    times = PipelineTimes(
        servers=tuple(f"<s{index}>" for index in range(num_servers)),
        visits=tuple(
            Visit(server=index, prefill_s=0.3, decode_s=0.01 * (index + 1), delay_s=0.001)
            for index in range(num_servers)
        ),
    )
    workload = Workload(new_tokens=new_tokens, num_sessions=2)
    return simulate_times(times, workload, num_requests=6, keep_events=keep_events)


def test_a_simulation_is_told_in_tables() -> None:
    result = simulation()
    text, html = str(result), result._repr_html_()
    for part in ("tokens/s", "first token", "between tokens", "whole request", "p99", "bottleneck", "6 requests"):
        assert part in text
        assert part in html
    assert "<s2>" in text
    assert "&lt;s2&gt;" in html
    assert "<s2>" not in html
    assert html.count("width:160px") == 3


def test_requests_of_one_token_have_no_time_between_tokens() -> None:
    assert "between tokens" not in str(simulation(new_tokens=1))


def test_of_many_servers_the_busiest_are_shown() -> None:
    result = simulation(50)
    text = str(result)
    assert "The 20 busiest of 50" in text
    assert "<s49>" in text
    assert "<s0>" not in text
    chart, bars = result.plot().axes
    assert len(chart.get_yticklabels()) == len(bars.patches) == 24


def test_a_simulation_is_plain_data() -> None:
    result = simulation()
    data = json.loads(json.dumps(result.to_dict()))
    assert data["bottleneck"] == "<s2>"
    assert data["utilisation"]["<s2>"] == result.utilisation["<s2>"]
    assert data["intervals"][0]["kind"] == "prefill"


def test_a_simulation_is_plotted() -> None:
    result = simulation()
    chart, bars = result.plot().axes
    assert [label.get_text() for label in chart.get_yticklabels()] == ["<s0>", "<s1>", "<s2>"]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(list(result.utilisation.values()))
    drawn = sum(len(collection.get_paths()) for collection in chart.collections)
    assert drawn == len(result.intervals) == 6 * 4 * 3
    legend = chart.get_legend()
    assert legend is not None
    assert [text.get_text().split()[0] for text in legend.get_texts()] == ["prefill", "decode", "bottleneck"]
    assert chart.get_xlim()[1] == max(interval.end_s for interval in result.intervals)


def test_the_chart_ends_where_the_kept_visits_end() -> None:
    result = simulation(keep_events=10)
    assert len(result.intervals) == 10
    assert result.plot().axes[0].get_xlim()[1] == result.intervals[-1].start_s


def test_a_chart_without_visits_is_empty() -> None:
    chart, bars = simulation(keep_events=0).plot().axes
    assert not chart.collections
    assert len(bars.patches) == 3

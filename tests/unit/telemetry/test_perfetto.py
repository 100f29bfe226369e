"""A trace keeps to the rules of the trace-event format, whatever was measured."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

import lingualinked as ll
from histories import START_S, decision, migration, recorded, timing
from lingualinked.telemetry.history import History
from lingualinked.telemetry.perfetto import trace_of
from lingualinked.telemetry.samples import StepSample

Event = dict[str, Any]

REQUIRED = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid", "args"},
    "s": {"name", "cat", "ts", "pid", "tid", "id"},
    "f": {"name", "cat", "ts", "pid", "tid", "id", "bp"},
    "i": {"name", "cat", "ts", "pid", "tid", "s", "args"},
    "C": {"name", "ts", "pid", "args"},
    "M": {"name", "pid", "tid", "args"},
}

seconds = st.one_of(st.just(0.0), st.floats(min_value=0, max_value=2))
timings = st.builds(
    timing,
    device=st.sampled_from(["a", "b"]),
    hop_s=seconds,
    wait_s=seconds,
    compute_s=seconds,
    codec_s=seconds,
)
steps = st.builds(
    StepSample,
    time_s=st.floats(min_value=START_S, max_value=START_S + 5),
    session=st.integers(0, 3),
    number=st.integers(0, 9),
    plan_version=st.just(1),
    rows=st.integers(1, 4),
    tokens=st.sampled_from([1, 16]),
    context=st.just(0),
    total_s=seconds,
    stages=st.lists(timings, max_size=4).map(tuple),
)


def ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def slices_of(trace: Event) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return start and end of the slices of each track, in nanoseconds."""
    slices = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            start = ns(event["ts"])
            slices[event["pid"], event["tid"]].append((start, start + ns(event["dur"])))
    return slices


def names_of(trace: Event) -> dict[int, str]:
    named = (event for event in trace["traceEvents"] if event["name"] == "thread_name")
    return {event["tid"]: event["args"]["name"] for event in named}


def check(trace: Event) -> None:
    """Assert the rules of the format, and that every arrow binds to a slice at either end."""
    events = trace["traceEvents"]
    for event in events:
        assert event.keys() >= REQUIRED[event["ph"]]
    timed = [event for event in events if event["ph"] != "M"]
    assert all(event["ts"] >= 0 for event in timed)
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    slices = slices_of(trace)
    for track in slices.values():
        assert all(start < end for start, end in track)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(track))
    arrows: dict[int, list[Event]] = defaultdict(list)
    for event in timed:
        if event["ph"] in "sf":
            arrows[event["id"]].append(event)
            track = slices[event["pid"], event["tid"]]
            assert any(start <= ns(event["ts"]) < end for start, end in track)
    for ends in arrows.values():
        assert [event["ph"] for event in ends] == ["s", "f"]
    named = set(names_of(trace))
    assert {event["tid"] for event in timed if event["ph"] != "C"} <= named
    assert len(named) == sum(event["name"] == "thread_name" for event in events)


@given(st.lists(steps, max_size=12), st.floats(min_value=0, max_value=START_S))
def test_any_history_is_a_valid_trace(samples: list[StepSample], start_s: float) -> None:
    trace = trace_of(History(start_s=start_s, steps=tuple(samples)))
    check(trace)
    counts = Counter(event["ph"] for event in trace["traceEvents"])
    num_hops = sum(len(each.stages) + 1 for each in samples if each.stages)
    assert counts["s"] == counts["f"] == num_hops


def test_a_recorded_pipeline_is_a_valid_trace() -> None:
    trace = trace_of(recorded(400))
    check(trace)
    names = list(names_of(trace).values())
    for name in ("caller", "caller 2", "laptop [0, 8)", "phone [8, 16)", "nas [16, 24)", "phone [11, 13)", "decisions"):
        assert name in names
    assert (
        names.index("caller") < names.index("laptop [0, 8)") < names.index("phone [8, 16)") < names.index("decisions")
    )
    counters = {event["name"] for event in trace["traceEvents"] if event["ph"] == "C"}
    assert counters >= {"tokens/s", "phone: memory held, MiB", "phone: temperature, °C", "phone: battery, %"}


def test_a_stage_that_is_busy_lets_others_wait_beside_it() -> None:
    history = recorded(400)
    trace = trace_of(history)
    names = names_of(trace)
    waits = [event for event in trace["traceEvents"] if event["name"] == "wait"]
    waited = sum(stage.wait_s >= 1e-6 for each in history.steps for stage in each.stages)
    assert len(waits) == waited > 0
    assert all("waiting" in names[event["tid"]] for event in waits)


def test_slices_are_as_long_as_was_measured() -> None:
    sample = recorded(1).steps[0]
    trace = trace_of(History(start_s=START_S, steps=(sample,)))
    work = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert Counter(event["name"] for event in work) == {"prefill": 4, "encode and decode": 3}
    whole, *stages = [event for event in work if event["name"] == "prefill"]
    assert whole["dur"] == pytest.approx(sample.total_s * 1e6, abs=0.01)
    assert whole["ts"] == pytest.approx((sample.time_s - START_S) * 1e6, abs=0.01)
    assert [event["dur"] for event in stages] == pytest.approx(
        [each.compute_s * 1e6 for each in sample.stages], abs=0.01
    )
    assert stages[1]["args"]["compute_s"] == sample.stages[1].compute_s
    assert stages[1]["args"]["session"] == 0


def test_decisions_are_instants_and_migrations_slices() -> None:
    history = recorded(400)
    trace = trace_of(history)
    decisions = [event for event in trace["traceEvents"] if event["ph"] == "i"]
    assert len(decisions) == len(history.decisions)
    (moved,) = [event for event in decisions if event["name"] == "move"]
    assert moved["args"]["slowdowns"]["phone"] == 4.1
    (slice_,) = [event for event in trace["traceEvents"] if event["name"] == "migration"]
    assert slice_["dur"] == pytest.approx(1.18e6)
    assert slice_["args"]["spans_after"][0] == ("laptop", 0, 11)


def test_a_failed_migration_says_why_and_overlaps_no_other() -> None:
    both = (migration(START_S + 1), migration(START_S + 1.5, error="no memory"))
    trace = trace_of(History(start_s=START_S, migrations=both))
    check(trace)
    (failed,) = [event for event in trace["traceEvents"] if event["name"] == "failed migration"]
    assert failed["args"]["error"] == "no memory"


def test_what_came_before_the_remembered_steps_is_left_out() -> None:
    history = recorded(10)
    early = History(
        start_s=START_S - 100,
        steps=history.steps,
        decisions=(decision(START_S - 50),),
        migrations=(migration(START_S - 50),),
    )
    trace = trace_of(early)
    check(trace)
    assert not [
        event for event in trace["traceEvents"] if event.get("cat") == "decision" or "migration" in event["name"]
    ]


def test_a_trace_is_a_json_file_that_replaces_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "trace.json"
    live = ll.Telemetry(stages=(), workers=(), history=recorded(20))
    assert live.to_perfetto(path) == path
    path.write_text("old", encoding="utf-8")
    assert live.to_perfetto(str(path)) == path
    trace = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    check(trace)
    assert [each.name for each in path.parent.iterdir()] == ["trace.json"]


def test_a_trace_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(OSError, match="taken"):
        ll.Telemetry(stages=(), workers=()).to_perfetto(target)
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]


def test_an_empty_history_is_a_valid_trace() -> None:
    trace = trace_of(History())
    check(trace)
    assert {event["ph"] for event in trace["traceEvents"]} == {"M"}

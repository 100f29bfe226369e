"""A profile is plain data that interpolates, survives JSON and refuses what can't be."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

import lingualinked as ll
from lingualinked.link_profile import LinkProfile
from lingualinked.module_times import ModuleTimes, StepTime
from lingualinked.profile import Profile
from profiles import profile, times


def test_json_gives_the_profile_back(tmp_path: Path) -> None:
    made = profile(ll.Device(name="a", memory="2GiB"), ll.Device(name="b", slowdown=3.0, bandwidth="1Gbit/s"))
    assert Profile.from_json(made.to_json()) == made
    made.save(tmp_path / "folder" / "profile.json")
    assert Profile.load(tmp_path / "folder" / "profile.json") == made
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["profile.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}'])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ll.ArgumentError, match="not the JSON of a profile"):
        Profile.from_json(text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ll.ArgumentError, match="no profile at"):
        Profile.load(tmp_path / "none.json")


@given(
    rows=st.sampled_from([1, 2, 3, 4]),
    context=st.floats(0, 2000),
    seconds=st.floats(1e-6, 10),
)
def test_decode_steps_are_linear_in_the_context(rows: int, context: float, seconds: float) -> None:
    assert times(seconds).seconds(rows, 1, context) == pytest.approx(seconds * (1 + context / 1000))


@given(rows=st.sampled_from([1, 2, 4, 8]), tokens=st.integers(2, 500), per_token=st.floats(1e-6, 1))
def test_prefill_steps_are_linear_in_the_tokens_and_the_rows(rows: int, tokens: int, per_token: float) -> None:
    assert times(1.0, per_token=per_token).seconds(rows, tokens, 0) == pytest.approx(per_token * tokens * rows)


def test_one_measured_shape_serves_all() -> None:
    one = ModuleTimes((StepTime(rows=1, tokens=1, context=10, seconds=2.0),))
    assert one.seconds(1, 1, 500) == 2.0
    assert one.seconds(3, 1, 500) == 2.0
    assert one.seconds(1, 64, 0) == 2.0  # nothing says that it depends on the tokens


@given(tokens=st.integers(2, 100_000))
def test_what_a_step_takes_in_any_case_is_not_multiplied_by_its_tokens(tokens: int) -> None:
    """One prefill and one decode step were measured: the line through both has 3 s that every step takes, and 2 s a token."""
    prefill, decode = (
        StepTime(rows=1, tokens=100, context=0, seconds=203.0),
        StepTime(rows=1, tokens=1, context=100, seconds=5.0),
    )
    assert ModuleTimes((prefill, decode)).seconds(1, tokens, 0) == pytest.approx(3.0 + 2.0 * tokens)


@given(tokens=st.integers(2, 5_000), context=st.integers(0, 5_000))
def test_new_tokens_take_longer_behind_others(tokens: int, context: int) -> None:
    """3 s that every step takes, 2 s a token, and 0.01 s for each pair of a new token and one before it."""

    def step(tokens: int, context: int) -> StepTime:
        seconds = 3.0 + 2.0 * tokens + 0.01 * tokens * context
        return StepTime(rows=1, tokens=tokens, context=context, seconds=seconds)

    measured = ModuleTimes((step(10, 90), step(100, 0), step(10, 0)))
    assert measured.seconds(1, tokens, context) == pytest.approx(step(tokens, context).seconds)


def test_times_do_not_fall_with_tokens_beyond_those_measured() -> None:
    steps = (StepTime(rows=1, tokens=100, context=0, seconds=2.0), StepTime(rows=1, tokens=1, context=0, seconds=3.0))
    assert ModuleTimes(steps).seconds(1, 10_000, 0) == 2.0


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_times_that_can_not_be_are_refused(seconds: float) -> None:
    with pytest.raises(ll.ArgumentError, match="seconds="):
        StepTime(rows=1, tokens=1, context=0, seconds=seconds)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latency_s", -1.0),
        ("latency_s", math.nan),
        ("bandwidth_bytes_per_s", 0.0),
        ("bandwidth_bytes_per_s", -5.0),
        ("bandwidth_bytes_per_s", math.nan),
    ],
)
def test_links_that_can_not_be_are_refused_by_name(field: str, value: float) -> None:
    fields: dict[str, Any] = {"latency_s": 0.0, "bandwidth_bytes_per_s": None} | {field: value}
    with pytest.raises(ll.ArgumentError, match=f"{field}=.* of the link from 'a' to 'b'"):
        LinkProfile(source="a", target="b", **fields)


def test_a_profile_must_be_whole() -> None:
    made = profile()
    with pytest.raises(ll.ArgumentError, match="devices of a profile are empty"):
        dataclasses.replace(made, devices=())
    with pytest.raises(ll.ArgumentError, match="hold 'a' twice"):
        dataclasses.replace(made, devices=(made.devices[0], made.devices[0]))
    with pytest.raises(ll.ArgumentError, match="the link from 'caller' to 'a' is missing"):
        dataclasses.replace(made, links=made.links[1:])
    foreign = LinkProfile(source="a", target="moon", latency_s=1.3, bandwidth_bytes_per_s=None)
    with pytest.raises(ll.ArgumentError, match="no device 'moon'"):
        dataclasses.replace(made, links=(*made.links, foreign))
    with pytest.raises(ll.ArgumentError, match="layers of device 'a' are of 0 kinds"):
        dataclasses.replace(made, devices=(dataclasses.replace(made.devices[0], layers=()), made.devices[1]))
    with pytest.raises(ll.ArgumentError, match="no device 'c' in this profile"):
        made.device("c")
    with pytest.raises(ll.ArgumentError, match="steps of module times are empty"):
        ModuleTimes(())


def test_devices_can_be_left_out_and_copied() -> None:
    made = profile(ll.Device(name="a"), ll.Device(name="b"), ll.Device(name="c"))
    assert made.without("b").names == ("a", "c")
    wider = made.with_copy("b", "b2")
    assert wider.names == ("a", "b", "c", "b2")
    assert wider.device("b2").layers == made.device("b").layers
    assert len(wider.links) == 5 * 4
    assert wider.without("b2") == made


def test_the_whole_model_on_one_device() -> None:
    """8 layers of 1 ms, 0.1 ms besides, 0.05 ms before and 0.5 ms after; twice that after 1,000 tokens, for 4 rows too."""
    made = profile(ll.Device(name="a"))
    seconds, spread_s = made.devices[0].whole_step_s(made.model, is_decode=True)
    assert seconds == pytest.approx(2 * (8 * 1e-3 + 0.65e-3))
    assert spread_s == 0.0
    prefill_s, _ = made.devices[0].whole_step_s(made.model, is_decode=False)
    assert prefill_s == pytest.approx(8 * 1e-4 * 128 * 4)  # 128 tokens of 4 rows


def test_a_profile_shows_its_times_their_spread_and_its_doubt() -> None:
    made = profile(ll.Device(name="a", memory="2GiB"), ll.Device(name="b"))
    text = str(made)
    for shown in (
        "small: 8 layers, float32",
        "a (2.0 GiB free)",
        "Layer",
        "prefill",
        "spread",
        "decode",
        "25.6 ms",
        "1.0 ms",
    ):
        assert shown in text
    assert "4 x 64 after 0, 4 x 1 after 0" in text
    assert "Doubtful" not in text
    assert "Doubtful: a reason" in str(dataclasses.replace(made, doubt="a reason"))
    assert "Doubtful: a reason" in str(ll.solve(dataclasses.replace(made, doubt="a reason")))


def test_capacity_is_what_is_known() -> None:
    unlimited, limited = profile(ll.Device(name="a"), ll.Device(name="b", memory=1000)).devices
    assert unlimited.capacity_bytes == math.inf
    assert limited.capacity_bytes == 1000
    assert dataclasses.replace(limited, free_bytes=400).capacity_bytes == 400

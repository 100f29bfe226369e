"""A simulated workload takes exactly the time that a plain simulation, server by server and step by step, says."""

from __future__ import annotations

import collections
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_allclose

from lingualinked.errors import ArgumentError, OverloadWarning
from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.simulation.line import PipelineTimes, Visit
from lingualinked.planning.simulation.recorder import Recorder
from lingualinked.planning.simulation.requests import Requests
from lingualinked.planning.simulation.simulate import run_requests, simulate_times
from lingualinked.planning.simulation.stations import stations_of
from lingualinked.workload import Workload

# Multiples of 1/64 are added without rounding: what is simultaneous in one simulation is so in the other.
GRID = st.integers(0, 12).map(lambda number: number / 64)
SECONDS = st.floats(0, 10, allow_subnormal=False)

Case = tuple[PipelineTimes, int, int, int, list[float] | None]  # line, requests, tokens, sessions, arrivals
Served = tuple[str, int, str, float, float]  # server, request, kind, start, end


def reference(
    case: Case, factors: Iterator[Floats] | None = None
) -> tuple[list[list[float]], list[float], list[Served]]:
    """Give when each token of each request is there, when each request starts, and every visit."""
    times, num_requests, num_tokens, num_sessions, arrivals = case
    tokens: list[list[float]] = [[] for _ in range(num_requests)]
    started = [0.0] * num_requests if arrivals is None else arrivals[:num_requests]
    free_s = [-math.inf] * len(times.servers)
    waiting = collections.deque(range(num_requests) if arrivals is None else [])
    served, order, num_free = [], itertools.count(), num_sessions
    scale: dict[int, Floats] = {}
    events: list[tuple[float, float, int, int]] = []  # when, order of issue (of arrivals: last), visit, request
    if arrivals is not None:
        events = [(started[request], math.inf, -1, request) for request in range(num_requests)]

    def issue(now: float, request: int) -> None:
        scale[request] = np.ones(len(times.visits)) if factors is None else next(factors)
        heapq.heappush(events, (now, next(order), 0, request))

    def begin_waiting(now: float) -> None:
        nonlocal num_free
        while waiting and num_free:
            num_free -= 1
            request = waiting.popleft()
            if arrivals is None:
                started[request] = now
            issue(now, request)

    begin_waiting(0.0)
    while events:
        now, rank, position, request = heapq.heappop(events)
        if position == -1:
            waiting.append(request)
            begin_waiting(now)
        elif position == len(times.visits):
            tokens[request].append(now)
            if len(tokens[request]) < num_tokens:
                issue(now, request)
            else:
                num_free += 1
                begin_waiting(now)
        else:
            visit, kind = times.visits[position], "decode" if tokens[request] else "prefill"
            start = max(now, free_s[visit.server])
            free_s[visit.server] = end = start + getattr(visit, f"{kind}_s") * scale[request][position]
            served.append((times.servers[visit.server], request, kind, start, end))
            heapq.heappush(events, (end + visit.delay_s, rank, position + 1, request))
    return tokens, started, served


def simulated(
    case: Case, factors: Iterator[Floats] | None = None, num_kept: int = 0
) -> tuple[Floats, Floats, Floats, Recorder]:
    times, num_requests, num_tokens, num_sessions, arrivals = case
    arrivals_s = None if arrivals is None else np.array(arrivals[:num_requests])
    requests, recorder = Requests(num_requests, num_tokens, num_sessions, arrivals_s), Recorder(num_kept)
    busy_s = run_requests(times, requests, factors, recorder)
    return requests.tokens_s(), requests.started_s(), busy_s, recorder


@st.composite
def cases(draw: st.DrawFn, seconds: st.SearchStrategy[float], *, repeats: bool) -> Case:
    num_visits = draw(st.integers(1, 9))
    num_servers = draw(st.integers(1, num_visits)) if repeats else num_visits
    visits = tuple(
        Visit(
            server=draw(st.integers(0, num_servers - 1)) if repeats else position,
            prefill_s=draw(seconds),
            decode_s=draw(seconds),
            delay_s=draw(seconds | st.just(0.0)),
        )
        for position in range(num_visits)
    )
    times = PipelineTimes(servers=tuple(f"s{index}" for index in range(num_servers)), visits=visits)
    num_requests = draw(st.integers(1, 12))
    arrivals = None
    if draw(st.booleans()):
        gaps = draw(st.lists(seconds | st.just(0.0), min_size=num_requests, max_size=num_requests))
        arrivals = list(itertools.accumulate(gaps))
    return times, num_requests, draw(st.integers(1, 7)), draw(st.integers(1, 9)), arrivals


def draws(seed: int, num_visits: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    while True:
        yield generator.lognormal(0, 0.4, num_visits)


def assert_same(case: Case, seed: int | None = None) -> None:
    def factors() -> Iterator[Floats] | None:
        return None if seed is None else draws(seed, len(case[0].visits))

    tokens, started, served = reference(case, factors())
    tokens_s, started_s, busy_s, _ = simulated(case, factors())
    assert_allclose(tokens_s, tokens, rtol=1e-9, atol=1e-12)
    assert_allclose(started_s, started, rtol=1e-9, atol=1e-12)
    assert_allclose(busy_s.sum(), sum(end - start for *_, start, end in served), rtol=1e-9, atol=1e-9)


@given(case=cases(SECONDS, repeats=False))
def test_a_line_takes_the_times_of_the_reference(case: Case) -> None:
    assert len(stations_of(case[0])) == 1
    assert_same(case)


@given(case=cases(GRID, repeats=False))
def test_a_line_with_many_simultaneous_events_takes_the_times_of_the_reference(case: Case) -> None:
    assert_same(case)


@given(case=cases(GRID, repeats=True))
def test_servers_that_are_visited_twice_serve_in_the_order_of_the_reference(case: Case) -> None:
    assert_same(case)


@given(case=cases(SECONDS, repeats=False), seed=st.integers(0, 2**32))
def test_a_line_with_service_times_that_vary_takes_the_times_of_the_reference(case: Case, seed: int) -> None:
    assert_same(case, seed)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), num_sessions=st.integers(1, 20), is_open=st.booleans())
def test_a_long_ring_takes_the_times_of_the_reference(seed: int, num_sessions: int, is_open: bool) -> None:
    generator = np.random.default_rng(seed)
    times = ring_of((generator.integers(1, 64, 20) / 64).tolist())
    arrivals = (np.sort(generator.integers(0, 6400, 30)) / 64).tolist() if is_open else None
    assert_same((times, 30, 5, num_sessions, arrivals))
    assert_same((times, 30, 5, num_sessions, arrivals), seed)


@given(case=cases(GRID, repeats=True), num_kept=st.integers(1, 60))
def test_the_visits_that_are_kept_are_those_that_start_first(case: Case, num_kept: int) -> None:
    served = sorted(reference(case)[2], key=lambda visit: visit[3])
    kept = [
        (each.server, each.request, each.kind, each.start_s, each.end_s)
        for each in simulated(case, num_kept=num_kept)[3].intervals(case[0])
    ]
    assert_allclose([visit[3] for visit in kept], [visit[3] for visit in served[:num_kept]], atol=1e-12)
    assert not collections.Counter(kept) - collections.Counter(served)


def line_of(decode_s: list[float], *, prefill: float = 5.0, delay_s: float = 0.0) -> PipelineTimes:
    return PipelineTimes(
        servers=tuple(f"s{index}" for index in range(len(decode_s))),
        visits=tuple(
            Visit(server=index, prefill_s=prefill * seconds, decode_s=seconds, delay_s=delay_s)
            for index, seconds in enumerate(decode_s)
        ),
    )


def ring_of(decode_s: list[float]) -> PipelineTimes:
    line = line_of(decode_s, delay_s=1 / 64)
    first_again = Visit(server=0, prefill_s=2 * decode_s[0], decode_s=3 * decode_s[0])
    return PipelineTimes(servers=line.servers, visits=(*line.visits, first_again))


@pytest.mark.parametrize("times", [line_of([0.1, 0.3, 0.2], delay_s=0.02), ring_of([0.1, 0.3, 0.2])])
@pytest.mark.parametrize("new_tokens", [1, 2, 50])
def test_one_session_never_waits(times: PipelineTimes, new_tokens: int) -> None:
    result = simulate_times(times, Workload(new_tokens=new_tokens, batch_size=3), num_requests=7)
    request_s = times.step_s("prefill") + (new_tokens - 1) * times.step_s("decode")
    assert result.makespan_s == pytest.approx(7 * request_s)
    assert result.tokens_per_s == pytest.approx(3 * new_tokens / request_s)
    assert result.requests_per_s == pytest.approx(1 / request_s)
    assert result.num_tokens == 7 * new_tokens * 3
    assert result.first_token_s.p99 == pytest.approx(times.step_s("prefill"))
    assert result.request_s.p50 == pytest.approx(request_s)
    if new_tokens == 1:
        assert result.inter_token_s is None
    else:
        assert result.inter_token_s is not None
        assert result.inter_token_s.mean == pytest.approx(times.step_s("decode"))


@pytest.mark.parametrize("times", [line_of([0.1, 0.3, 0.2], delay_s=0.02), ring_of([0.3, 0.2, 0.1])])
def test_many_sessions_are_served_at_the_rate_of_the_bottleneck(times: PipelineTimes) -> None:
    workload = Workload(new_tokens=32, num_sessions=30)
    result = simulate_times(times, workload)
    busy_s = collections.Counter[str]()
    for visit in times.visits:
        busy_s[times.servers[visit.server]] += visit.prefill_s + 31 * visit.decode_s
    name, bottleneck_s = busy_s.most_common(1)[0]
    assert result.bottleneck == name
    assert result.requests_per_s <= 1 / bottleneck_s
    assert result.requests_per_s == pytest.approx(1 / bottleneck_s, rel=0.02)
    for server, fraction in result.utilisation.items():
        assert fraction == pytest.approx(result.num_requests * busy_s[server] / result.makespan_s)


def test_each_request_is_one_prefill_step_and_a_decode_step_for_each_further_token() -> None:
    result = simulate_times(ring_of([0.1, 0.2]), Workload(new_tokens=6, num_sessions=3), num_requests=5)
    counts = collections.Counter((each.request, each.kind) for each in result.intervals)
    assert counts == {(r, kind): 3 * n for r in range(5) for kind, n in (("prefill", 1), ("decode", 5))}
    assert {each.session for each in result.intervals} == {0, 1, 2}
    busy_s = sum(each.end_s - each.start_s for each in result.intervals)
    assert sum(result.utilisation.values()) == pytest.approx(busy_s / result.makespan_s)


def test_percentiles_are_those_of_the_durations() -> None:
    times = line_of([1.0], prefill=1.0)
    result = simulate_times(times, Workload(new_tokens=1), num_requests=101, arrivals=[0.0] * 101)
    # The n-th of 101 requests that arrive together is there after n seconds.
    assert result.first_token_s == result.request_s
    spread = result.request_s
    assert (spread.mean, spread.p50, spread.p90, spread.p99) == pytest.approx((51, 51, 91, 100))


def test_requests_that_arrive_rarely_wait_for_nobody() -> None:
    times = line_of([0.1, 0.2])
    result = simulate_times(times, Workload(new_tokens=3, num_sessions=2), arrivals=[10.0, 20.0, 30.0])
    assert result.num_requests == 3
    assert result.request_s.p99 == pytest.approx(times.step_s("prefill") + 2 * times.step_s("decode"))
    assert result.makespan_s == pytest.approx(20 + result.request_s.p99)


def test_a_request_that_finds_all_sessions_taken_waits() -> None:
    result = simulate_times(line_of([1.0], prefill=1.0), Workload(new_tokens=4), arrivals=[0.0, 1.0])
    assert result.first_token_s.mean == pytest.approx((1 + 4) / 2)


def test_random_arrivals_queue_as_theory_says() -> None:
    times = line_of([1.0], prefill=1.0)
    result = simulate_times(times, Workload(new_tokens=1, num_sessions=1), arrivals=0.5, num_requests=40_000, seed=3)
    assert result.utilisation["s0"] == pytest.approx(0.5, rel=0.02)
    assert result.request_s.mean == pytest.approx(1.5, rel=0.03)  # M/D/1: service + rate / (2 (1 - rate)), rate 0.5


@pytest.mark.parametrize(
    ("num_sessions", "capacity", "reason"),
    [(1, 1 / 2.8, r"each takes 2\.80 s"), (8, 1 / 2, r"each keeps 's1' busy for 2\.00 s")],
)
def test_arrivals_beyond_capacity_are_warned_of(num_sessions: int, capacity: float, reason: str) -> None:
    times, workload = line_of([0.1, 0.25]), Workload(new_tokens=4, num_sessions=num_sessions)
    simulate_times(times, workload, arrivals=0.99 * capacity, num_requests=20)
    simulate_times(times, workload, arrivals=[0.0] * 20)  # a burst that ends
    with pytest.warns(OverloadWarning, match=reason):
        simulate_times(times, workload, arrivals=1.01 * capacity, num_requests=20)


def test_seeds_decide_what_is_random() -> None:
    times, workload = line_of([0.1, 0.2]), Workload(new_tokens=4, num_sessions=2)
    for options in ({"arrivals": 0.3}, {"jitter": 0.2}):
        first, again, other = (simulate_times(times, workload, seed=seed, **options) for seed in (1, 1, 2))
        assert first == again
        assert first != other


def test_jitter_keeps_the_mean_and_has_the_deviation_that_is_asked_for() -> None:
    times = line_of([0.1], prefill=1.0)
    result = simulate_times(times, Workload(new_tokens=1), num_requests=20_000, jitter=0.3, seed=1, keep_events=20_000)
    durations = np.array([each.end_s - each.start_s for each in result.intervals])
    assert durations.mean() == pytest.approx(0.1, rel=0.01)
    assert durations.std() == pytest.approx(0.03, rel=0.05)
    assert result.utilisation["s0"] == pytest.approx(1)


def test_the_default_number_of_requests_gives_each_session_several() -> None:
    times = line_of([0.1])
    assert simulate_times(times, Workload(new_tokens=1)).num_requests == 16
    assert simulate_times(times, Workload(new_tokens=1, num_sessions=10)).num_requests == 40
    assert simulate_times(times, Workload(new_tokens=1), arrivals=1.0).num_requests == 512


def test_fewer_requests_than_sessions_leave_sessions_empty() -> None:
    result = simulate_times(line_of([0.1, 0.1]), Workload(num_sessions=50, new_tokens=2), num_requests=3)
    assert result.num_requests == 3


def test_a_line_is_cut_only_where_the_order_may_change() -> None:
    assert len(stations_of(line_of([0.1] * 5))) == 1
    assert len(stations_of(line_of([0.0] * 5))) == 1
    assert [station.visits for station in stations_of(ring_of([0.1] * 5))] == [slice(0, 5), slice(5, 6)]


@pytest.mark.parametrize("name", ["prefill_s", "decode_s", "delay_s"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, "1", None, True])
def test_times_that_are_no_seconds_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        Visit(**{"server": 0, "prefill_s": 1.0, "decode_s": 1.0, "delay_s": 0.0, name: value})


@pytest.mark.parametrize("server", [-1, 0.5, True, "a"])
def test_servers_that_are_no_index_are_refused(server: Any) -> None:
    with pytest.raises(ArgumentError, match="server="):
        Visit(server=server, prefill_s=1, decode_s=1)


def test_lines_that_are_none_are_refused() -> None:
    visit = Visit(server=1, prefill_s=1, decode_s=1)
    with pytest.raises(ArgumentError, match="visits is empty"):
        PipelineTimes(servers=("a",), visits=())
    with pytest.raises(ArgumentError, match=r"server=1 of visits\[0\] is unknown: the servers are 0 to 0"):
        PipelineTimes(servers=("a",), visits=(visit,))
    with pytest.raises(ArgumentError, match=r"servers has \['a'\] more than once"):
        PipelineTimes(servers=("a", "a"), visits=(visit,))


@pytest.mark.parametrize(
    "options",
    [
        {"num_requests": 0},
        {"num_requests": 2.5},
        {"num_requests": True},
        {"keep_events": -1},
        {"seed": -1},
        {"jitter": -0.1},
        {"jitter": math.nan},
        {"arrivals": 0},
        {"arrivals": -2.0},
        {"arrivals": math.inf},
        {"arrivals": True},
        {"arrivals": []},
        {"arrivals": [2.0, 1.0]},
        {"arrivals": [math.nan]},
        {"arrivals": "soon"},
        {"num_requests": 3, "arrivals": [0.0, 1.0]},
    ],
)
def test_arguments_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        simulate_times(line_of([0.1]), Workload(), **options)


def test_a_line_that_takes_no_time_has_no_rate() -> None:
    with pytest.raises(ArgumentError, match="times"):
        simulate_times(line_of([0.0, 0.0]), Workload())

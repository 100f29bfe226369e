"""A simulated workload takes exactly the time that a model of it in simpy takes, server by server and step by step."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import assume, given, settings, strategies as st
from numpy.testing import assert_allclose
from simpy.core import EventPriority

from lingualinked.errors import ArgumentError, OverloadWarning
from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.simulation.event_heap import Course, EventHeap
from lingualinked.planning.simulation.line import PipelineTimes, Visit
from lingualinked.planning.simulation.simulate import simulate_times
from lingualinked.workload import Workload

# Multiples of 1/64 are added without rounding: what is simultaneous in one simulation is so in the other.
GRID = st.integers(0, 12).map(lambda number: number / 64)
SECONDS = st.floats(0, 10, allow_subnormal=False)
FIRST_RANK = 2  # simpy's own events of an instant, 0 and 1, come before all steps,
LAST_RANK = 1 << 62  # and arrivals after them

Case = tuple[PipelineTimes, int, int, int, list[float] | None]  # line, requests, tokens, sessions, arrivals
Served = tuple[str, int, str, float, float]  # server, request, kind, start, end


class TimeOut(simpy.Event):
    """A simpy time-out after which, of the steps at one instant, the one that was issued first goes on first."""

    def __init__(self, env: simpy.Environment, delay_s: float, rank: int) -> None:
        super().__init__(env)
        self._ok, self._value = True, None  # as simpy.Timeout does
        env.schedule(self, EventPriority(FIRST_RANK + rank), delay_s)


def modelled(
    case: Case, factors: Iterator[Floats] | None = None
) -> tuple[list[list[float]], list[float], list[Served]]:
    """When each token of each request is there, when each request starts, and every visit, as simpy has them."""
    times, num_requests, num_tokens, num_sessions, arrivals = case
    env, issued = simpy.Environment(), itertools.count()
    servers = [simpy.Resource(env) for _ in times.servers]
    sessions = simpy.Resource(env, num_sessions)
    tokens: list[list[float]] = [[] for _ in range(num_requests)]
    started, served = [0.0] * num_requests, []

    def step(request: int, kind: str) -> Iterator[simpy.Event]:
        rank, scale = next(issued), np.ones(len(times.visits)) if factors is None else next(factors)
        yield TimeOut(env, 0.0, rank)
        for visit, factor in zip(times.visits, scale.tolist(), strict=True):
            with servers[visit.server].request() as turn:
                yield turn
                start = env.now
                yield TimeOut(env, getattr(visit, f"{kind}_s") * factor, rank)
                served.append((times.servers[visit.server], request, kind, start, env.now))
            yield TimeOut(env, visit.delay_s, rank)

    def run(request: int) -> Iterator[simpy.Event]:
        if arrivals is not None:
            yield TimeOut(env, arrivals[request], LAST_RANK + request)
        arrived = env.now
        with sessions.request() as session:
            yield session
            started[request] = env.now if arrivals is None else arrived
            for token in range(num_tokens):
                yield from step(request, "decode" if token else "prefill")
                tokens[request].append(env.now)

    for request in range(num_requests):
        env.process(run(request))
    env.run()
    return tokens, started, served


def simulated(case: Case, factors: Iterator[Floats] | None = None, num_kept: int = 0) -> Course:
    times, num_requests, num_tokens, num_sessions, arrivals = case
    return EventHeap(
        times,
        num_requests=num_requests,
        num_tokens=num_tokens,
        num_sessions=num_sessions,
        arrivals_s=None if arrivals is None else arrivals[:num_requests],
        factors=factors,
        num_kept=num_kept,
    ).run()


@st.composite
def cases(draw: st.DrawFn, seconds: st.SearchStrategy[float], *, repeats: bool) -> Case:
    num_visits = draw(st.integers(1, 9))
    num_servers = draw(st.integers(1, num_visits)) if repeats else num_visits
    # Of steps that come back to a server in no time, simpy takes those that wait there first, and we the one issued first.
    busy = seconds.filter(lambda busy_s: busy_s > 1e-3) if repeats else seconds
    visits = tuple(
        Visit(
            server=draw(st.integers(0, num_servers - 1)) if repeats else position,
            prefill_s=draw(busy),
            decode_s=draw(busy),
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
    """Both add the same numbers in the same order, so that not even the last bit differs; sums of seconds may."""

    def factors() -> Iterator[Floats] | None:
        return None if seed is None else draws(seed, len(case[0].visits))

    tokens, started, served = modelled(case, factors())
    course = simulated(case, factors())
    assert course.tokens_s.tolist() == tokens
    assert course.started_s.tolist() == started
    busy_s = dict.fromkeys(case[0].servers, 0.0)
    for server, _, _, start, end in served:
        busy_s[server] += end - start
    assert_allclose(course.busy_s, list(busy_s.values()), rtol=1e-9, atol=1e-9)


@given(case=cases(SECONDS, repeats=False))
def test_a_line_takes_the_times_that_simpy_says(case: Case) -> None:
    assert_same(case)


@given(case=cases(GRID, repeats=False))
def test_a_line_with_many_simultaneous_events_takes_the_times_that_simpy_says(case: Case) -> None:
    assert_same(case)


@given(case=cases(GRID, repeats=True))
def test_servers_that_are_visited_twice_serve_in_the_order_that_simpy_says(case: Case) -> None:
    assert_same(case)


@given(case=cases(SECONDS, repeats=True), seed=st.integers(0, 2**32))
def test_a_line_with_service_times_that_vary_takes_the_times_that_simpy_says(case: Case, seed: int) -> None:
    assert_same(case, seed)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), num_sessions=st.integers(1, 20), is_open=st.booleans())
def test_a_long_ring_takes_the_times_that_simpy_says(seed: int, num_sessions: int, is_open: bool) -> None:
    generator = np.random.default_rng(seed)
    times = ring_of((generator.integers(1, 64, 20) / 64).tolist())
    arrivals = (np.sort(generator.integers(0, 6400, 30)) / 64).tolist() if is_open else None
    assert_same((times, 30, 5, num_sessions, arrivals))
    assert_same((times, 30, 5, num_sessions, arrivals), seed)


@given(case=cases(GRID, repeats=True), num_kept=st.integers(0, 60))
def test_the_visits_that_are_kept_are_those_that_start_first(case: Case, num_kept: int) -> None:
    served = sorted(modelled(case)[2], key=lambda visit: visit[3])
    kept = [
        (each.server, each.request, each.kind, each.start_s, each.end_s)
        for each in simulated(case, num_kept=num_kept).intervals
    ]
    assert [visit[3] for visit in kept] == [visit[3] for visit in served[:num_kept]]
    assert not collections.Counter(kept) - collections.Counter(served)


@settings(max_examples=30)
@given(case=cases(SECONDS, repeats=True))
def test_rates_and_latencies_are_those_that_simpy_says(case: Case) -> None:
    times, num_requests, num_tokens, num_sessions, arrivals = case
    tokens, started, served = modelled(case)
    makespan_s = max(map(max, tokens)) - min(started)
    assume(makespan_s > 0)
    workload = Workload(new_tokens=num_tokens, num_sessions=num_sessions, batch_size=2)
    result = simulate_times(times, workload, num_requests=num_requests, arrivals=arrivals)
    assert result.makespan_s == makespan_s
    assert result.tokens_per_s == 2 * num_requests * num_tokens / makespan_s
    assert result.first_token_s.p50 == np.percentile(np.array(tokens)[:, 0] - started, 50)
    assert result.request_s.p99 == np.percentile(np.array(tokens)[:, -1] - started, 99)
    assert {each.session for each in result.intervals} == set(range(min(num_sessions, num_requests)))
    for interval in result.intervals:
        visit = interval.server, interval.request, interval.kind, interval.start_s, interval.end_s
        assert visit in served


def test_a_session_runs_one_request_at_a_time() -> None:
    result = simulate_times(ring_of([0.1, 0.2]), Workload(new_tokens=3, num_sessions=3), num_requests=20)
    for session in range(3):
        own = [each for each in result.intervals if each.session == session]
        requests = [request for request, _ in itertools.groupby(own, key=lambda each: each.request)]
        assert len(requests) == len(set(requests))


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


@pytest.mark.parametrize("name", ["prefill_s", "decode_s", "delay_s"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, "1", None, True])
def test_times_that_are_no_seconds_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        Visit(**{"server": 0, "prefill_s": 1.0, "decode_s": 1.0, "delay_s": 0.0, name: value})


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

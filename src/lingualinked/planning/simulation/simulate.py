"""Run a workload through a pipeline in simulation: every step of every request.

Knows seconds and servers; not where the seconds come from, and nothing runs.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from numbers import Real

import numpy as np

from lingualinked.checks import as_integer, is_real
from lingualinked.errors import ArgumentError, OverloadWarning
from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.plan import Plan
from lingualinked.planning.prediction import HopPrediction, Prediction, ShortcutPrediction
from lingualinked.planning.simulation.event_heap import Course, EventHeap
from lingualinked.planning.simulation.line import PipelineTimes, Visit
from lingualinked.planning.simulation.result import Percentiles, Simulation
from lingualinked.quantities import count_text, seconds_text
from lingualinked.workload import Workload


def simulate(
    plan: Plan,
    workload: Workload | None = None,
    *,
    num_requests: int | None = None,
    arrivals: Sequence[float] | float | None = None,
    seed: int = 0,
    jitter: float = 0.0,
    keep_events: int = 2000,
) -> Simulation:
    """Run a workload through a plan's pipeline in simulation: devices compute, links carry, steps wait for each other.

    A request is one prefill step, or the steps of its chunks, issued together, of which the last one gives its first token; and ``new_tokens - 1`` decode steps, each issued when
    the one before is back at the caller. At most ``num_sessions`` requests are in flight; the next one starts at the
    instant at which one is finished. Devices and links are the servers: each serves one step at a time, first in, first
    out; steps that reach it at the same instant are served in the order in which they were issued. Decode steps all take
    what they are predicted to take at the workload's mean context. Where batches run as microbatches, each of these is a request.

    Given these times, this is exact: no fluid limit, no sampling. Each visit of a step is one event; a million of them take
    about a second. Where steps on a line with repeated servers reach one at the same instant by different ways, but for the
    rounding of sums, rounding decides which is served first.

    Parameters
    ----------
    plan : Plan
        With the profile that it was made from.
    workload : Workload or None
        What to run; ``None``: what the plan was made for.
    num_requests : int, optional
        How many to run. By default all that `arrivals` lists; else so many that what comes of filling and draining
        the pipeline hardly shows (4 per session and at least 16; of random arrivals 16 per session and at least 512).
    arrivals : float or sequence of float, optional
        A number: requests arrive at random (Poisson), so many a second. A sequence: the seconds at which they arrive,
        in ascending order. They wait, first in, first out, until fewer than ``num_sessions`` are in flight. By
        default there is always a request that waits.
    seed : int
        Of the random arrivals and of the jitter.
    jitter : float
        Relative standard deviation of all service times, which are then log-normal around what is predicted as their mean.
    keep_events : int
        Of so many visits, those that start first, the result holds the intervals, for the Gantt chart.

    Returns
    -------
    Simulation
        Utilisation, throughput, latency percentiles; shows itself as a table, and ``plot()`` as a Gantt chart.

    Raises
    ------
    ArgumentError
        If the plan has no profile, a number is out of range, the arrivals are not in ascending order or fewer than
        `num_requests`, or nothing takes any time. The message names the argument.

    Warns
    -----
    OverloadWarning
        If more requests arrive per second than the pipeline can serve.
    """
    if not isinstance(plan, Plan):
        raise ArgumentError(f"plan is a {type(plan).__name__}: give a lingualinked.Plan")
    predicted = plan.predicted if workload is None else plan.predict(workload)
    return simulate_times(
        pipeline_times(predicted),
        predicted.workload.by_microbatch(),
        num_requests=num_requests,
        arrivals=arrivals,
        seed=seed,
        jitter=jitter,
        keep_events=keep_events,
    )


def pipeline_times(predicted: Prediction) -> PipelineTimes:
    """Return the line of servers that a plan is predicted to be: links and devices by turns."""
    servers: dict[str, int] = {}
    visits = []
    for index, (hop, stage) in enumerate(itertools.zip_longest(predicted.hops, predicted.stages)):
        sent: list[tuple[HopPrediction | ShortcutPrediction, float]] = [(hop, hop.latency_s)]
        sent += [(shortcut, 0.0) for shortcut in predicted.shortcuts if shortcut.stage == index]
        visits += [
            Visit(
                server=servers.setdefault(f"{each.source} -> {each.target}", len(servers)),
                prefill_s=each.prefill_transfer_s,
                chunks_s=each.chunk_transfers_s,
                decode_s=each.decode_transfer_s,
                delay_s=latency_s,
            )
            for each, latency_s in sent
        ]
        if stage is not None:
            device = servers.setdefault(stage.device, len(servers))
            visits.append(
                Visit(server=device, prefill_s=stage.prefill_s, chunks_s=stage.chunks_s, decode_s=stage.decode_s)
            )
    return PipelineTimes(servers=tuple(servers), visits=tuple(visits))


def simulate_times(
    times: PipelineTimes,
    workload: Workload,
    *,
    num_requests: int | None = None,
    arrivals: Sequence[float] | float | None = None,
    seed: int = 0,
    jitter: float = 0.0,
    keep_events: int = 2000,
) -> Simulation:
    """Run a workload, whose prompt's length is in the times already, as `simulate` does."""
    keep_events = _count("keep_events", keep_events, at_least=0)
    seed = _count("seed", seed, at_least=0)
    if not is_real(jitter) or not 0 <= jitter < math.inf:
        raise ArgumentError(f"jitter={jitter!r} must be a finite number, at least 0")
    if num_requests is not None:
        num_requests = _count("num_requests", num_requests, at_least=1)
    arrival_seed, jitter_seed = np.random.SeedSequence(seed).spawn(2)
    arrivals_s = _arrivals(arrivals, num_requests, workload.num_sessions, arrival_seed)
    if isinstance(arrivals, Real):
        _warn_of_overload(float(arrivals), times, workload)
    if num_requests is None:
        num_requests = max(16, 4 * workload.num_sessions) if arrivals_s is None else len(arrivals_s)
    events = EventHeap(
        times,
        num_requests=num_requests,
        num_tokens=workload.new_tokens,
        num_sessions=workload.num_sessions,
        arrivals_s=None if arrivals_s is None else arrivals_s.tolist(),
        factors=_factors(jitter, len(times.visits), jitter_seed) if jitter else None,
        num_kept=keep_events,
    )
    return _summary(times, events.run(), workload.batch_size)


def _warn_of_overload(arrivals: float, times: PipelineTimes, workload: Workload) -> None:
    """Warn where requests arrive faster than they can be served: then no figure is steady."""
    busy_s = times.busy_s(workload.new_tokens - 1)
    busiest = max(busy_s, key=lambda name: busy_s[name])
    request_s = times.step_s("prefill") + (workload.new_tokens - 1) * times.step_s("decode")
    sessions = count_text(workload.num_sessions, "session")
    interval_s, reason = max(
        (busy_s[busiest], f"each keeps {busiest!r} busy for {seconds_text(busy_s[busiest])}"),
        (request_s / workload.num_sessions, f"each takes {seconds_text(request_s)}, with {sessions} in flight"),
    )
    if arrivals * interval_s > 1:
        warnings.warn(
            f"{arrivals:.3g} requests arrive per second, and at most {1 / interval_s:.3g} can be served: {reason}. They queue "
            "without bound, so that latencies depend on num_requests; lower arrivals, allow more sessions, or add devices",
            OverloadWarning,
            stacklevel=3,
        )


def _summary(times: PipelineTimes, course: Course, batch_size: int) -> Simulation:
    started_s, tokens_s, busy_s = course.started_s, course.tokens_s, course.busy_s
    num_requests, num_tokens = tokens_s.shape
    makespan_s = float(tokens_s.max() - started_s.min())
    if makespan_s <= 0:
        raise ArgumentError("times: no visit takes any time, so no rate can be computed")
    return Simulation(
        num_requests=num_requests,
        num_tokens=tokens_s.size * batch_size,
        makespan_s=makespan_s,
        tokens_per_s=tokens_s.size * batch_size / makespan_s,
        requests_per_s=num_requests / makespan_s,
        utilisation={name: each_s / makespan_s for name, each_s in zip(times.servers, busy_s, strict=True)},
        bottleneck=times.servers[busy_s.index(max(busy_s))],
        first_token_s=Percentiles.of(tokens_s[:, 0] - started_s),
        request_s=Percentiles.of(tokens_s[:, -1] - started_s),
        inter_token_s=Percentiles.of(np.diff(tokens_s)) if num_tokens > 1 else None,
        intervals=course.intervals,
    )


def _arrivals(
    arrivals: Sequence[float] | float | None, num_requests: int | None, num_sessions: int, seed: np.random.SeedSequence
) -> Floats | None:
    if arrivals is None:
        return None
    if isinstance(arrivals, Real):
        rate = float(arrivals)
        if isinstance(arrivals, bool) or not 0 < rate < math.inf:
            raise ArgumentError(f"arrivals={arrivals!r} must be a positive, finite number of requests per second")
        num_arrivals = max(512, 16 * num_sessions) if num_requests is None else num_requests
        return np.random.default_rng(seed).exponential(1 / rate, num_arrivals).cumsum()
    try:
        arrivals_s = np.array(arrivals, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"arrivals must be a rate or a sequence of seconds: {error}") from error
    if arrivals_s.ndim != 1 or not arrivals_s.size or not np.isfinite(arrivals_s).all():
        raise ArgumentError("arrivals must be a rate or a sequence of finite seconds, at least one")
    if (np.diff(arrivals_s) < 0).any():
        raise ArgumentError("arrivals must be in ascending order")
    if num_requests is not None and num_requests > arrivals_s.size:
        raise ArgumentError(f"num_requests={num_requests} is more than the {count_text(arrivals_s.size, 'arrival')}")
    return arrivals_s[:num_requests]


def _factors(jitter: float, num_visits: int, seed: np.random.SeedSequence) -> Iterator[Floats]:
    """Draw for one step after the other; the mean of each factor is 1."""
    generator, variance = np.random.default_rng(seed), math.log1p(jitter**2)
    while True:
        yield from generator.lognormal(-variance / 2, math.sqrt(variance), size=(64, num_visits))


def _count(name: str, value: int, *, at_least: int) -> int:
    count = as_integer(value, at_least=at_least)
    if count is None:
        raise ArgumentError(f"{name}={value!r} must be an integer, at least {at_least}")
    return count

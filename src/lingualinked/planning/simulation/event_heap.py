"""A simulation's events, on one heap: a request arrives, a step reaches a server, a step is back at the caller.

Knows servers, requests and seconds; neither where the seconds come from nor what is computed from the results.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator

import numpy as np

from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.simulation.line import PipelineTimes, StepKind
from lingualinked.planning.simulation.result import BusyInterval

_ARRIVAL = -1  # in place of a visit: the request arrives
_AFTER_ALL_STEPS = 1 << 62  # the rank of arrivals among what happens at one instant


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """What happened in a simulation of R requests of T tokens."""

    started_s: Floats  # [R], when each request arrived or, where requests always wait, was issued
    tokens_s: Floats  # [R, T], when each token was at the caller
    busy_s: list[float]  # of each server
    intervals: tuple[BusyInterval, ...]  # the visits that started first, in that order


class EventHeap:
    """What is still to happen, in order of time; of what happens at one instant, the step that was issued first.

    Every server serves one step at a time, first in, first out. ``arrivals_s`` ascend; ``None``: all requests wait from the
    start. ``factors`` are float64 ``[V]`` for each step in the order of issue, and multiply its seconds at each visit;
    ``num_kept`` visits, those that start first, are kept as intervals.
    """

    def __init__(
        self,
        times: PipelineTimes,
        *,
        num_requests: int,
        num_tokens: int,
        num_sessions: int,
        arrivals_s: list[float] | None,
        factors: Iterator[Floats] | None,
        num_kept: int,
    ) -> None:
        self._times = times
        self._num_tokens = num_tokens
        self._num_kept = num_kept
        self._factors = itertools.repeat(np.ones(len(times.visits))) if factors is None else factors
        self._mean_s: dict[StepKind, Floats] = {  # a row for each step that is issued
            "prefill": np.array([visit.prefill_steps_s for visit in times.visits], dtype=np.float64).T,
            "decode": np.array([[visit.decode_s for visit in times.visits]], dtype=np.float64),
        }
        self._delays_s = [float(visit.delay_s) for visit in times.visits]
        self._servers = [int(visit.server) for visit in times.visits]
        self._free_s = [-math.inf] * len(times.servers)  # when each has served all steps that have reached it
        self._busy_s = [0.0] * len(times.servers)
        self._kept: list[tuple[float, int, int, int, StepKind, float]] = []  # a heap: what starts last is its first
        self._tokens_s: list[list[float]] = [[] for _ in range(num_requests)]
        self._step_s: dict[int, list[float]] = {}  # of a step, by its rank, at each visit
        self._num_awaited = [0] * num_requests  # chunks of a request, or its step
        self._session_of = [0] * num_requests
        self._idle_sessions = collections.deque(range(num_sessions))
        self._num_issued = self._num_served = 0
        self._always_wait = arrivals_s is None
        self._started_s = [0.0] * num_requests if arrivals_s is None else arrivals_s
        self._waiting = collections.deque(range(num_requests) if arrivals_s is None else ())
        self._heap = [  # when, rank at that instant, visit, request
            (arrival_s, _AFTER_ALL_STEPS, _ARRIVAL, request) for request, arrival_s in enumerate(arrivals_s or ())
        ]
        self._start_requests(0.0)

    def run(self) -> Course:
        """Let everything happen, one event after the other."""
        while self._heap:
            now_s, rank, visit, request = heapq.heappop(self._heap)
            if visit == _ARRIVAL:
                self._waiting.append(request)
                self._start_requests(now_s)
            elif visit < len(self._servers):
                self._serve(now_s, rank, visit, request)
            else:
                self._finish_step(now_s, rank, request)
        return Course(
            started_s=np.array(self._started_s),
            tokens_s=np.array(self._tokens_s),
            busy_s=self._busy_s,
            intervals=self._intervals(),
        )

    def _start_requests(self, now_s: float) -> None:
        """Start requests that wait, first come, first served, in sessions that are idle."""
        while self._waiting and self._idle_sessions:
            request = self._waiting.popleft()
            self._session_of[request] = self._idle_sessions.popleft()
            if self._always_wait:
                self._started_s[request] = now_s
            self._issue_step(now_s, request)

    def _issue_step(self, now_s: float, request: int) -> None:
        steps_s = self._mean_s[self._kind(request)]
        self._num_awaited[request] = len(steps_s)
        for step_s in steps_s:
            self._step_s[self._num_issued] = (step_s * next(self._factors)).tolist()
            heapq.heappush(self._heap, (now_s, self._num_issued, 0, request))
            self._num_issued += 1

    def _serve(self, now_s: float, rank: int, visit: int, request: int) -> None:
        """Serve a step that reaches a server, once that is free, and send it on to the next one."""
        server, busy_s = self._servers[visit], self._step_s[rank][visit]
        start_s = max(now_s, self._free_s[server])
        self._free_s[server] = end_s = start_s + busy_s
        self._busy_s[server] += busy_s
        heapq.heappush(self._heap, (end_s + self._delays_s[visit], rank, visit + 1, request))
        self._num_served += 1
        keep = heapq.heappush if len(self._kept) < self._num_kept else heapq.heappushpop
        keep(self._kept, (-start_s, -self._num_served, visit, request, self._kind(request), end_s))

    def _finish_step(self, now_s: float, rank: int, request: int) -> None:
        """Note that a token is there, unless the step is an earlier chunk; the request goes on, or leaves its session to another."""
        del self._step_s[rank]
        self._num_awaited[request] -= 1
        if self._num_awaited[request]:
            return
        self._tokens_s[request].append(now_s)
        if len(self._tokens_s[request]) < self._num_tokens:
            self._issue_step(now_s, request)
        else:
            self._idle_sessions.append(self._session_of[request])
            self._start_requests(now_s)

    def _kind(self, request: int) -> StepKind:
        return "decode" if self._tokens_s[request] else "prefill"

    def _intervals(self) -> tuple[BusyInterval, ...]:
        return tuple(
            BusyInterval(
                server=self._times.servers[self._servers[visit]],
                session=self._session_of[request],
                request=request,
                kind=kind,
                start_s=-negative_start_s,
                end_s=end_s,
            )
            for negative_start_s, _, visit, request, kind, end_s in sorted(self._kept, reverse=True)
        )

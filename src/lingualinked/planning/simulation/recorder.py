"""The first visits of a simulation, by the time at which they start.

Knows what it is told about each step; nothing waits for it.
"""

from __future__ import annotations

import math

import numpy as np

from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.simulation.line import PipelineTimes
from lingualinked.planning.simulation.result import BusyInterval
from lingualinked.planning.simulation.stretch import PREFILL


class Recorder:
    """Keeps those visits that start first, of many that are told in another order.

    Parameters
    ----------
    num_kept : int
        How many to keep.
    """

    __slots__ = ("_last_start_s", "_num_kept", "_num_new", "_rows")

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._last_start_s = math.inf if num_kept else -math.inf
        self._rows: list[Floats] = []  # each float64 [6, visits]: start, end, visit, session, request, kind
        self._num_new = 0

    def wants(self, now_s: float) -> bool:
        """Say whether a visit that starts now or later can still be one of the first."""
        return now_s < self._last_start_s

    def add(self, starts_s: Floats, busy_s: Floats, first_visit: int, session: int, request: int, kind: int) -> None:
        """Record the consecutive visits of a step, the first of them number `first_visit` of the line."""
        num_visits = len(starts_s)
        rows = np.empty((6, num_visits))
        rows[0], rows[1], rows[2] = starts_s, starts_s + busy_s, np.arange(first_visit, first_visit + num_visits)
        rows[3], rows[4], rows[5] = session, request, kind
        self._rows.append(rows)
        self._num_new += num_visits
        if self._num_new >= self._num_kept:
            self._trim()

    def intervals(self, times: PipelineTimes) -> tuple[BusyInterval, ...]:
        """Return what is kept, in the order of start."""
        if not self._rows:
            return ()
        self._trim()
        return tuple(
            BusyInterval(
                server=times.servers[times.visits[int(visit)].server],
                session=int(session),
                request=int(request),
                kind="prefill" if kind == PREFILL else "decode",
                start_s=float(start_s),
                end_s=float(end_s),
            )
            for start_s, end_s, visit, session, request, kind in self._rows[0].T
        )

    def _trim(self) -> None:
        rows = np.concatenate(self._rows, axis=1)
        rows = rows[:, np.argsort(rows[0], kind="stable")[: self._num_kept]]
        self._rows, self._num_new = [rows], 0
        if rows.shape[1] == self._num_kept:
            self._last_start_s = float(rows[0, -1])

"""A line of servers cut into stations: what a step passes from one event to the next.

Knows servers and seconds; not what a step is for, and not which comes next.
"""

from __future__ import annotations

import math

import numpy as np

from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.simulation.line import PipelineTimes
from lingualinked.planning.simulation.stretch import Stretch


class Station:
    """A visit to any server, then a stretch of servers that are visited nowhere else, if one follows.

    Parameters
    ----------
    times : PipelineTimes
        The whole line.
    start, end : int
        The half-open range of its visits.
    free_s : list of float
        When each server is free; one list that all stations share.
    """

    __slots__ = ("_busy_s", "_delay_s", "_free_s", "_server", "_start_s", "_stretch", "_visits")

    def __init__(self, times: PipelineTimes, start: int, end: int, free_s: list[float]) -> None:
        head, tail = times.visits[start], times.visits[start + 1 : end]
        self._visits = slice(start, end)
        self._server, self._free_s, self._start_s = int(head.server), free_s, -math.inf
        self._busy_s, self._delay_s = (float(head.prefill_s), float(head.decode_s)), float(head.delay_s)
        columns = np.array([(visit.prefill_s, visit.decode_s, visit.delay_s) for visit in tail], dtype=np.float64)
        self._stretch = Stretch(*columns.T.copy()) if tail else None

    @property
    def visits(self) -> slice:
        """The visits of the line that are made here."""
        return self._visits

    def serve(self, now_s: float, kind: int) -> float:
        """Serve a step of a kind that arrives now, not before the last one; give when it goes on to the next station."""
        self._start_s = start_s = max(now_s, self._free_s[self._server])
        self._free_s[self._server] = left_s = start_s + self._busy_s[kind]
        if self._stretch is None:
            return left_s + self._delay_s
        return self._stretch.enter(left_s + self._delay_s, kind)

    def serve_with(self, now_s: float, busy_s: Floats) -> float:
        """Serve a step whose visits to the whole line take what float64 ``[V]`` says; give when it goes on."""
        here_s = busy_s[self._visits]
        self._start_s = start_s = max(now_s, self._free_s[self._server])
        self._free_s[self._server] = left_s = start_s + float(here_s[0])
        if self._stretch is None:
            return left_s + self._delay_s
        return self._stretch.enter_with(left_s + self._delay_s, here_s[1:])

    def last_starts(self) -> Floats:
        """Return the seconds at which the step that was served last starts at each visit."""
        if self._stretch is None:
            return np.array([self._start_s])
        return np.concatenate(([self._start_s], self._stretch.last_starts()))


def stations_of(times: PipelineTimes) -> list[Station]:
    """Cut a line where the order of steps may change: before each visit to a server that is visited elsewhere too.

    Steps that leave such a server one by one keep their order on the way to the next. After a visit that takes no
    time they may leave together, and the one that was issued first goes first: there the line is cut as well.
    A line on which no server occurs twice is one station.
    """
    visits = times.visits
    counts = np.bincount([visit.server for visit in visits])
    cuts = [0]
    if counts.max() > 1:
        cuts += [
            position
            for position in range(1, len(visits))
            if counts[visits[position].server] > 1
            or not visits[position - 1].prefill_s
            or not visits[position - 1].decode_s
        ]
    free_s = [-math.inf] * len(times.servers)
    return [Station(times, start, end, free_s) for start, end in zip(cuts, [*cuts[1:], len(visits)], strict=True)]

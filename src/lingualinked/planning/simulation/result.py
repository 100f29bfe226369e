"""What a simulated pipeline did: rates, utilisation, latencies, and who was busy when at the beginning.

Knows how to describe itself, not how it was simulated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.simulation.line import StepKind
from lingualinked.registry import figure_of
from lingualinked.shown import Shown


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """How a duration is distributed, in seconds.

    Parameters
    ----------
    mean, p50, p90, p99 : float
        Seconds: the mean, and what 50 %, 90 % and 99 % do not exceed (interpolated linearly).
    """

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, durations_s: Floats) -> Percentiles:
        """Compute them from float64 seconds, of any shape and not empty."""
        p50, p90, p99 = np.percentile(durations_s, (50, 90, 99))
        return cls(mean=float(durations_s.mean()), p50=float(p50), p90=float(p90), p99=float(p99))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BusyInterval:
    """One visit of a step to a server.

    Parameters
    ----------
    server : str
        Name of the server.
    session, request : int
        Which of the sessions in flight the step belongs to, and which request in the order of their start, from 0.
    kind : str
        ``"prefill"`` or ``"decode"``.
    start_s, end_s : float
        Seconds from and until which the step keeps the server busy.
    """

    server: str
    session: int
    request: int
    kind: StepKind
    start_s: float
    end_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Simulation(Shown):
    """What a workload did that ran through a pipeline in simulation.

    Parameters
    ----------
    num_requests, num_tokens : int
        Requests that ran, and tokens that all their rows got.
    makespan_s : float
        Seconds from the start (with arrivals: the first of them) until the last token is at the caller.
    tokens_per_s, requests_per_s : float
        Tokens of all rows, and requests, per second of the makespan.
    utilisation : mapping of str to float
        Of each server: the fraction of the makespan for which it was busy.
    bottleneck : str
        The server that was busy longest.
    first_token_s, request_s : Percentiles
        Seconds from a request's start (its arrival, where there are arrivals) to its first and to its last token.
    inter_token_s : Percentiles or None
        Seconds between two tokens of a request; None if requests have one.
    intervals : tuple of BusyInterval
        The visits that start first, in that order, for the Gantt chart.
    """

    num_requests: int
    num_tokens: int
    makespan_s: float
    tokens_per_s: float
    requests_per_s: float
    utilisation: Mapping[str, float]
    bottleneck: str
    first_token_s: Percentiles
    request_s: Percentiles
    inter_token_s: Percentiles | None
    intervals: tuple[BusyInterval, ...] = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as nested plain Python data."""
        return dataclasses.asdict(self)

    def plot(self) -> Any:
        """Draw who is busy when, and utilisation (needs matplotlib: ``pip install lingualinked[plot]``).

        Returns
        -------
        matplotlib.figure.Figure
        """
        return figure_of(self)

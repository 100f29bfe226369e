"""What spans and hops cost under an objective, and how the costs of a placement combine.

Knows the tables of one problem; not which placements there are, nor how the cheapest one is found.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lingualinked.planning.placement.problem import Flags, Floats, Problem
from lingualinked.planning.placement.spans import TOLERANCE, SpanTables


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """Costs of the parts of a placement; what is not allowed costs ``inf``.

    A placement costs ``enter . span . hop . span ... leave``, where ``.`` is `combine`: addition (latency, energy) or
    the maximum (throughput, missing bytes). Both make a semiring with the minimum, so one shortest-path recursion
    serves all.

    Parameters
    ----------
    combine : ufunc
        ``np.add`` or ``np.maximum``; 0 is neutral for both, as no cost is negative.
    span : ndarray
        float64 ``[D, L+1, L+1]``, of a stage with layers ``[i, j)``.
    hop : ndarray
        float64 ``[D, D]``.
    enter, leave : ndarray
        float64 ``[D]``, from and to the caller.
    front : ndarray
        float64 ``[D, L+1]``, of entering a ring on a device that takes ``[0, a)``.
    close : ndarray
        float64 ``[D, L+1, L+1]``, of closing that ring with ``[b, L)`` and leaving it, at ``[d, a, b]``.
    """

    combine: np.ufunc
    span: Floats
    hop: Floats
    enter: Floats
    leave: Floats
    front: Floats
    close: Floats

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.span.shape[1]) - 1

    @property
    def closers(self) -> tuple[int, ...]:
        """Devices that some ring could start and end on."""
        possible = np.isfinite(self.close).any(axis=(1, 2))
        return tuple(int(device) for device in np.flatnonzero(possible))


def bottleneck_costs(problem: Problem, tables: SpanTables) -> Costs:
    """Cost parts by the seconds in which they are busy; the largest counts.

    Parameters
    ----------
    problem : Problem
        The problem.
    tables : SpanTables
        Of it.

    Returns
    -------
    Costs
        In seconds.
    """
    fits = tables.excess_bytes == 0
    ring_s = np.stack([tables.ring_seconds(device) for device in range(problem.num_devices)])
    leave = np.where(np.isfinite(problem.leave_s), problem.leave_busy_s, np.inf)
    enter = np.where(np.isfinite(problem.enter_s), problem.enter_busy_s, np.inf)
    close = np.where(tables.ring_excess_bytes == 0, np.maximum(ring_s, leave[:, None, None]), np.inf)
    return Costs(
        combine=np.maximum,
        span=np.where(fits, tables.seconds, np.inf),
        hop=_hops(problem, problem.busy_s),
        enter=enter,
        leave=leave,
        front=np.maximum(enter[:, None], tables.seconds[:, 0, :]),
        close=close,
    )


def latency_costs(problem: Problem, tables: SpanTables, max_bottleneck_s: float) -> Costs:
    """Cost parts by their seconds; the sum counts.

    Parameters
    ----------
    problem : Problem
        The problem.
    tables : SpanTables
        Of it.
    max_bottleneck_s : float
        Parts that are busy for longer are not allowed; may be ``inf``.

    Returns
    -------
    Costs
        In seconds.
    """
    weight = np.ones(problem.num_devices)
    return _sum_costs(problem, tables, max_bottleneck_s, weight, problem.hop_s, problem.enter_s, problem.leave_s)


def energy_costs(problem: Problem, tables: SpanTables, max_bottleneck_s: float, joules_per_s: float = 0.0) -> Costs:
    """Cost parts by the energy of their compute; the sum counts.

    Parameters
    ----------
    problem : Problem
        With every device's power.
    tables : SpanTables
        Of it.
    max_bottleneck_s : float
        Parts that are busy for longer are not allowed; may be ``inf``.
    joules_per_s : float
        A small price of latency, so that of two placements with the same energy the faster one is cheaper.

    Returns
    -------
    Costs
        In joules.
    """
    hop_s, enter_s, leave_s = (
        np.where(np.isfinite(seconds), joules_per_s * np.where(np.isfinite(seconds), seconds, 0.0), np.inf)
        for seconds in (problem.hop_s, problem.enter_s, problem.leave_s)
    )
    return _sum_costs(problem, tables, max_bottleneck_s, problem.watts + joules_per_s, hop_s, enter_s, leave_s)


def excess_costs(problem: Problem, tables: SpanTables) -> Costs:
    """Cost parts by the bytes that their device lacks; the largest counts, and links only have to exist.

    Parameters
    ----------
    problem : Problem
        The problem.
    tables : SpanTables
        Of it.

    Returns
    -------
    Costs
        In bytes.
    """
    enter, leave = (np.where(np.isfinite(seconds), 0.0, np.inf) for seconds in (problem.enter_s, problem.leave_s))
    front = np.broadcast_to(enter[:, None], tables.seconds.shape[:2]).copy()
    return Costs(
        combine=np.maximum,
        span=tables.excess_bytes,
        hop=_hops(problem, np.zeros_like(problem.hop_s)),
        enter=enter,
        leave=leave,
        front=front,
        close=np.maximum(tables.ring_excess_bytes, leave[:, None, None]),
    )


def _sum_costs(
    problem: Problem,
    tables: SpanTables,
    max_bottleneck_s: float,
    weights: Floats,
    hop: Floats,
    enter: Floats,
    leave: Floats,
) -> Costs:
    limit = max_bottleneck_s * (1 + TOLERANCE)
    busy = bottleneck_costs(problem, tables)
    weight = weights[:, None, None]
    allowed = _within(busy.span, limit)
    span = np.where(allowed, weight * np.where(allowed, tables.seconds, 0.0), np.inf)
    leave = np.where(_within(busy.leave, limit), leave, np.inf)
    enter = np.where(_within(busy.enter, limit), enter, np.inf)
    last = np.where(np.isfinite(tables.seconds[:, :, -1]), tables.seconds[:, :, -1], 0.0)
    close = weight * last[:, None, :] + leave[:, None, None]
    first = np.where(np.isfinite(tables.seconds[:, 0, :]), tables.seconds[:, 0, :], 0.0)
    return Costs(
        combine=np.add,
        span=span,
        hop=np.where(_within(busy.hop, limit), hop, np.inf),
        enter=enter,
        leave=leave,
        front=weights[:, None] * first + enter[:, None],
        close=np.where(_within(busy.close, limit), close, np.inf),
    )


def _within(busy_s: Floats, limit_s: float) -> Flags:
    return np.isfinite(busy_s) & (busy_s <= limit_s)


def _hops(problem: Problem, cost: Floats) -> Floats:
    hops = np.where(np.isfinite(problem.hop_s), cost, np.inf)
    np.fill_diagonal(hops, np.inf)
    return hops

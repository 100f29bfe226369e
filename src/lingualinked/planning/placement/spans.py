"""Tables over every span of every device: seconds of compute, and bytes beyond the device's memory.

Knows one placement problem; not in which order devices follow one another, and no objective.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lingualinked.planning.placement.problem import Floats, Problem

TOLERANCE = 1e-12
"""Relative. The same sum formed in another order differs by a few times 1e-16 per term; 1e-12 forgives thousands."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SpanTables:
    """Seconds and excess bytes of span ``[i, j)`` on device d, as stage of its own and as half of a ring.

    Parameters
    ----------
    seconds : ndarray
        float64 ``[D, L+1, L+1]``, compute of the stage, the ends' cost included; ``inf`` where the span is empty.
    excess_bytes : ndarray
        float64 ``[D, L+1, L+1]``, bytes by which the stage passes the device's memory, 0 if it fits; ``inf`` where the
        span is empty or the device may not hold all of its layers.
    ring_excess_bytes : ndarray
        float64 ``[D, L+1, L+1]``, the same for ``[0, a)`` and ``[b, L)`` together on one device, at ``[d, a, b]``;
        ``inf`` also where the device may not hold both ends.
    """

    seconds: Floats
    excess_bytes: Floats
    ring_excess_bytes: Floats

    @classmethod
    def of(cls, problem: Problem) -> SpanTables:
        """Tabulate a problem.

        Parameters
        ----------
        problem : Problem
            D devices and L layers.

        Returns
        -------
        SpanTables
            Three tables of D (L+1)² numbers.
        """
        num_layers = problem.num_layers
        is_span = np.triu(np.ones((num_layers + 1, num_layers + 1), dtype=bool), 1)
        seconds = _windows(problem.layer_s) + problem.stage_s[:, None, None]
        seconds[:, 0, :] += problem.first_s[:, None]
        seconds[:, :, -1] += problem.last_s[:, None]
        seconds[:, ~is_span] = np.inf

        window_bytes = _windows(problem.layer_bytes[None])[0]
        num_bytes = window_bytes + problem.stage_bytes[:, None, None]
        num_bytes[:, 0, :] += problem.first_bytes
        num_bytes[:, :, -1] += problem.last_bytes
        num_bytes[:, 0, -1] -= problem.tied_bytes
        excess = _beyond(num_bytes, problem.capacity_bytes)
        excess[~problem.may_be_first, : problem.num_front, :] = np.inf
        excess[~problem.may_be_last, :, num_layers - problem.num_back + 1 :] = np.inf
        excess[:, ~is_span] = np.inf

        both_ends = window_bytes[0][:, None] + window_bytes[:, -1][None, :]
        both_ends += problem.first_bytes + problem.last_bytes - problem.tied_bytes
        ring = _beyond(both_ends + 2 * problem.stage_bytes[:, None, None], problem.capacity_bytes)
        ring[~(problem.may_close & problem.may_be_first & problem.may_be_last)] = np.inf
        is_ring = is_span.copy()
        is_ring[0, :] = is_ring[:, -1] = False
        ring[:, ~is_ring] = np.inf
        return cls(seconds, excess, ring)

    def ring_seconds(self, device: int) -> Floats:
        """Give the compute of ``[0, a)`` and ``[b, L)`` together on one device.

        Parameters
        ----------
        device : int
            Its index.

        Returns
        -------
        ndarray
            float64 ``[L+1, L+1]``, at ``[a, b]``.
        """
        return self.seconds[device, 0, :, None] + self.seconds[device, None, :, -1]


def _windows(values: Floats) -> Floats:
    """Sum of each half-open window, ``[D, L]`` to ``[D, L+1, L+1]``; nonsense where ``i > j``."""
    before = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=before[:, 1:])
    return before[:, None, :] - before[:, :, None]


def _beyond(num_bytes: Floats, capacity_bytes: Floats) -> Floats:
    limit = capacity_bytes[:, None, None]
    allowed = np.where(np.isinf(limit), np.inf, limit * (1 + TOLERANCE))
    finite = np.where(np.isinf(limit), 0.0, limit)
    return np.where(num_bytes <= allowed, 0.0, num_bytes - finite)

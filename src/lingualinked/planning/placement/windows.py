"""What each device can hold if no part of a placement may cost more than a threshold.

Knows costs that combine by the maximum, and one threshold; no order of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lingualinked.planning.placement.costs import Costs
from lingualinked.planning.placement.problem import Flags, Floats
from lingualinked.planning.placement.spans import TOLERANCE


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Furthest ends within a threshold, for n devices.

    Ending further is never worse: whoever can go on from a layer can go on from a later one.

    Parameters
    ----------
    devices : ndarray
        int64 ``[n]``, indices in the problem.
    reach : ndarray
        int64 ``[n, L+1]``, furthest end, before layer L, of a span that starts at i and is not the last; i if there is
        none. Not decreasing in i.
    closes : ndarray
        bool ``[n, L+1]``, whether the last span may start at i.
    follows : ndarray
        bool ``[n, n]``, whether there is a hop.
    ring_device, ring_start, ring_close : ndarray
        int64 ``[R]``: first halves of rings, as position of the device, their end, and the least start of the second.
    alone : int
        Position of a device that can hold all layers, or -1.
    """

    devices: NDArray[np.int64]
    reach: NDArray[np.int64]
    closes: Flags
    follows: Flags
    ring_device: NDArray[np.int64]
    ring_start: NDArray[np.int64]
    ring_close: NDArray[np.int64]
    alone: int

    @classmethod
    def within(cls, costs: Costs, devices: Sequence[int], threshold: float) -> Windows:
        """Tabulate what fits.

        Parameters
        ----------
        costs : Costs
            Combined by the maximum.
        devices : sequence of int
            Those that may be used.
        threshold : float
            The most that a part may cost.

        Returns
        -------
        Windows
            Of these devices.
        """
        limit = threshold * (1 + TOLERANCE)
        order = np.array(devices, dtype=int)
        num_layers = costs.num_layers
        fits = (costs.span[order] <= limit) & np.isfinite(costs.span[order])
        inner = fits[:, :, :-1]
        enters = costs.enter[order] <= limit
        leaves = costs.leave[order] <= limit
        furthest = num_layers - 1 - inner[:, :, ::-1].argmax(axis=2)
        reach = np.where(inner.any(axis=2), furthest, np.arange(num_layers + 1))
        reach[~enters, 0] = 0
        reach = np.minimum(np.maximum.accumulate(reach, axis=1), np.maximum(num_layers - 1, np.arange(num_layers + 1)))
        closes = fits[:, :, -1] & leaves[:, None]
        whole = np.flatnonzero(closes[:, 0] & enters)
        closes[:, 0] = False
        rings = (costs.close[order] <= limit) & (costs.front[order] <= limit)[:, :, None]
        device, start = np.nonzero(rings.any(axis=2))
        return cls(
            devices=order,
            reach=reach,
            closes=closes,
            follows=costs.hop[np.ix_(order, order)] <= limit,
            ring_device=device,
            ring_start=start,
            ring_close=rings[device, start].argmax(axis=1),
            alone=int(whole[0]) if len(whole) else -1,
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.reach.shape[1]) - 1

    def gains(self, progress: Floats) -> Floats:
        """Give the most progress that each device can make, as any stage.

        Parameters
        ----------
        progress : ndarray
            float64 ``[L+1]``, progress at each layer, not decreasing.

        Returns
        -------
        ndarray
            float64 ``[n]``.
        """
        inner = (progress[self.reach] - progress).max(axis=1)
        last = np.where(self.closes, progress[-1] - progress, 0.0).max(axis=1)
        return np.asarray(np.maximum(inner, last))


def thresholds(costs: Costs, devices: Sequence[int], low: float, high: float) -> Floats:
    """Give every value in an interval that the dearest part of a placement could have.

    Parameters
    ----------
    costs : Costs
        Combined by the maximum.
    devices : sequence of int
        Those that may be used.
    low, high : float
        The interval ``[low, high)``.

    Returns
    -------
    ndarray
        float64, ascending.
    """
    order = np.array(devices, dtype=int)
    tables = (
        costs.span[order],
        costs.close[order],
        costs.hop[np.ix_(order, order)],
        costs.enter[order],
        costs.leave[order],
    )
    values = np.concatenate([table.ravel() for table in tables])
    return np.unique(values[np.isfinite(values) & (values >= low) & (values < high)])

"""Prices of layers, devices and links: the dual solution of a programme over all windows of all devices.

Knows costs that add up; no order of devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lingualinked.planning.placement.costs import Costs
from lingualinked.planning.placement.linear import OPTIMAL, Matrix, minimise
from lingualinked.planning.placement.problem import Floats

MAX_WINDOWS = 60_000
"""Windows that a programme may have: HiGHS takes a second or two for as many."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """What the rest of a placement costs at least.

    Parameters
    ----------
    bound : float
        Least cost of any placement, rings included.
    rest : ndarray
        float64 ``[L+1]``, of the layers from i on.
    device : ndarray
        float64 ``[n]``, at most 0: what having each device still free can save.
    onward : ndarray
        float64 ``[n]``, of going on from each device.
    """

    bound: float
    rest: Floats
    device: Floats
    onward: Floats


def prices_of(costs: Costs, devices: Sequence[int]) -> Prices | None:
    """Solve the programme over windows and read its dual solution.

    Variables: ``z_dij`` for each span ``[i, j)`` that device d can hold, and ``y_de`` for each hop, all at least 0.
    Every layer is in one window, a device has at most one (its first and another one if it may close a ring), every
    window but a first one has a hop inwards and every one but a last one a hop outwards. Minimised is the cost of
    windows and hops. Every placement satisfies this, so that the optimum is a bound, and so is what the dual solution
    says of a rest [1]_: with layer prices p, device prices m and outward prices b, a placement that has ended on device
    e before layer i, with devices F free, costs at least ``b_e + sum_{l >= i} p_l + sum_{d in F} m_d`` more.

    Parameters
    ----------
    costs : Costs
        Combined by addition.
    devices : sequence of int
        Those that may be used.

    Returns
    -------
    Prices or None
        None if there are too many windows, or no solution.

    References
    ----------
    .. [1] G. Desaulniers, J. Desrosiers, M. M. Solomon (eds.), "Column Generation", Springer, 2005, chapter 1.
    """
    order = np.array(devices, dtype=int)
    n, num_layers = len(order), costs.num_layers
    span = costs.span[order].copy()
    span[:, 0, :] += costs.enter[order][:, None]
    span[:, :, -1] += costs.leave[order][:, None]
    device, start, end = np.nonzero(np.isfinite(span))
    halves = _ring_halves(costs, order)
    if not len(device) or len(device) + sum(len(half[0]) for half in halves) > MAX_WINDOWS:
        return None
    window_cost = np.concatenate([span[device, start, end], *(half[3] for half in halves)])
    row = np.concatenate([device, halves[0][0] + n, halves[1][0]])  # a ring's first half counts on a row of its own
    device, start, end = (
        np.concatenate([column, *(half[k] for half in halves)]) for k, column in enumerate((device, start, end))
    )
    here, there = np.nonzero(np.isfinite(costs.hop[np.ix_(order, order)]))
    hop_cost = costs.hop[order[here], order[there]]
    num_windows, num_hops = len(device), len(here)

    def matrix(row: NDArray[np.int64], column: NDArray[np.int64], height: int, width: int) -> Matrix:
        return sparse.csr_matrix((np.ones(len(row)), (row, column)), (height, width))

    lengths = end - start
    layer = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths - start, lengths)
    covers = matrix(layer, np.repeat(np.arange(num_windows), lengths), num_layers, num_windows)
    inward, outward = np.flatnonzero(start > 0), np.flatnonzero(end < num_layers)
    scale = float(np.median(window_cost)) or 1.0
    answer = minimise(
        np.concatenate([window_cost, hop_cost]) / scale,
        equal=[
            (sparse.hstack([covers, sparse.csr_matrix((num_layers, num_hops))]), np.ones(num_layers)),
            (
                sparse.hstack(
                    [-matrix(device[inward], inward, n, num_windows), matrix(there, np.arange(num_hops), n, num_hops)]
                ),
                np.zeros(n),
            ),
            (
                sparse.hstack(
                    [-matrix(device[outward], outward, n, num_windows), matrix(here, np.arange(num_hops), n, num_hops)]
                ),
                np.zeros(n),
            ),
        ],
        at_most=[
            (
                sparse.hstack(
                    [matrix(row, np.arange(num_windows), 2 * n, num_windows), sparse.csr_matrix((2 * n, num_hops))]
                ),
                np.ones(2 * n),
            )
        ],
    )
    if answer.status != OPTIMAL:
        return None
    layers, _, onward, single, _ = np.split(answer.prices * scale, np.cumsum([num_layers, n, n, n]))
    rest = np.concatenate([np.cumsum(layers[::-1])[::-1], [0.0]])
    return Prices(max(0.0, answer.bound * scale), rest, np.minimum(single, 0.0), onward)


def _ring_halves(costs: Costs, order: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], ...]]:
    """Give device, start, end and cost of the first halves of rings, and of the second ones at their cheapest."""
    first = np.where(np.isfinite(costs.close[order]).any(axis=2), costs.front[order], math.inf)
    second = costs.close[order].min(axis=1)
    device, end = np.nonzero(np.isfinite(first))
    last, start = np.nonzero(np.isfinite(second))
    return [
        (device, np.zeros_like(end), end, first[device, end]),
        (last, start, np.full_like(start, costs.num_layers), second[last, start]),
    ]


def priced_order(
    costs: Costs, devices: Sequence[int], prices: Prices, limit: float, width: int
) -> tuple[int, ...] | None:
    """Search an order whose parts cost least together, by a beam guided by prices.

    States with the same devices, last device and layers are compared by cost; of the others those are kept whose cost,
    with the least that the rest costs by the prices, is smallest. Rings are not looked at.

    Parameters
    ----------
    costs : Costs
        Combined by addition.
    devices : sequence of int
        At most 64 that may be used.
    prices : Prices
        Of these costs and devices.
    limit : float
        Cost of a known placement.
    width : int
        Number of states kept after each device.

    Returns
    -------
    tuple of int
        Devices in order; None if nothing cheaper than the limit was found.
    """
    order = np.array(devices, dtype=int)
    n = len(order)
    span, leave = costs.span[order], costs.leave[order]
    hops = np.vstack([costs.hop[np.ix_(order, order)], costs.enter[order]])  # row -1: from the caller
    used, last, end, cost = np.zeros(1, dtype=np.uint64), np.array([-1]), np.array([0]), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    best: tuple[int, int, int] | None = None
    for level in range(n):
        parts = []
        for device in range(n):
            bit = np.uint64(1) << np.uint64(device)
            rows = np.flatnonzero((used & bit == 0) & np.isfinite(hops[last, device]))
            total = (cost[rows] + hops[last[rows], device])[:, None] + span[device][end[rows]]
            whole = total[:, -1] + leave[device]
            if len(rows) and whole.min() < limit:
                limit, best = float(whole.min()), (level, int(rows[whole.argmin()]), device)
            free = np.where((used[rows, None] >> np.arange(n, dtype=np.uint64)) & np.uint64(1) == 0, prices.device, 0.0)
            saved = free.sum(axis=1) - prices.device[device]
            estimate = total[:, :-1] + prices.rest[:-1] + saved[:, None] + prices.onward[device]
            at, to = np.nonzero(estimate < limit)
            parts.append(
                (used[rows[at]] | bit, np.full_like(at, device), to, total[at, to], rows[at], estimate[at, to])
            )
        used, last, end, cost, parent, estimate = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        keep = np.flatnonzero(estimate < limit)
        keep = keep[np.argsort(estimate[keep], kind="stable")[: 8 * width]]
        keep = keep[np.lexsort((cost[keep], end[keep], last[keep], used[keep]))]
        same = (
            (used[keep][1:] == used[keep][:-1])
            & (last[keep][1:] == last[keep][:-1])
            & (end[keep][1:] == end[keep][:-1])
        )
        keep = keep[np.append(True, ~same)[: len(keep)]]
        keep = keep[np.argsort(estimate[keep], kind="stable")[:width]]
        used, last, end, cost = used[keep], last[keep], end[keep], cost[keep]
        trail.append((last, parent[keep]))
        if not len(keep):
            break
    if best is None:
        return None
    level, row, closing = best
    found = [closing]
    for lasts, parents in reversed(trail[:level]):
        found.append(int(lasts[row]))
        row = int(parents[row])
    return tuple(int(order[device]) for device in reversed(found))

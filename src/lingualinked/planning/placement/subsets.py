"""The cheapest placement over all orders of a few devices, by dynamic programming over their subsets.

Knows costs; no linear programme. Work doubles with each device, so `work_of` says beforehand how much it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lingualinked.planning.placement.costs import Costs
from lingualinked.planning.placement.orders import Route
from lingualinked.planning.placement.problem import Floats, Placement, Span


def work_of(num_devices: int, num_layers: int) -> float:
    """Estimate the additions that `best_of_subsets` makes for placements without rings.

    Parameters
    ----------
    num_devices, num_layers : int
        Of the problem.

    Returns
    -------
    float
        About 1e9 take a second.
    """
    return 2.0**num_devices * num_devices / 4 * (num_layers + 1) ** 2


def best_of_subsets(costs: Costs, devices: Sequence[int]) -> Route | None:
    """Find the cheapest placement on any of the devices in any order.

    The state is (devices used, the last of them, layers placed), as in the programme of Held and Karp for the
    travelling salesman [1]_. Rings are searched one closing device at a time, all its first halves together.

    Parameters
    ----------
    costs : Costs
        Of the objective.
    devices : sequence of int
        Those that may be used.

    Returns
    -------
    Route or None
        None if there is no placement.

    References
    ----------
    .. [1] M. Held, R. M. Karp, "A dynamic programming approach to sequencing problems", J. SIAM 10 (1962), 196-210.
    """
    order = np.array(devices, dtype=int)
    source = np.full((1, len(order), costs.num_layers + 1), np.inf)
    sink = source.copy()
    source[0, :, 0] = costs.enter[order]
    sink[0, :, -1] = costs.leave[order]
    value, placement = _search(costs, order, source, sink, math.inf)
    for device in costs.closers:
        between = order[order != device]
        ends = np.flatnonzero(np.isfinite(costs.close[device]).any(axis=1) & (costs.front[device] < value))
        if device not in order or not len(between) or not len(ends):
            continue
        source = np.full((len(ends), len(between), costs.num_layers + 1), np.inf)
        for row, end in enumerate(ends):
            source[row, :, end] = costs.combine(costs.front[device, end], costs.hop[device, between])
        sink = costs.combine(costs.hop[between, device][None, :, None], costs.close[device, ends][:, None, :])
        ring_value, inner = _search(costs, between, source, sink, value)
        if ring_value < value:
            value = ring_value
            halves = Span(device, 0, inner[0].start), Span(device, inner[-1].end, costs.num_layers)
            placement = (halves[0], *inner, halves[1])
    return None if value == math.inf else Route(value, placement)


def _search(
    costs: Costs, order: NDArray[np.int64], source: Floats, sink: Floats, limit: float
) -> tuple[float, Placement]:
    """Shortest path for each row of sources and sinks ``[A, n, L+1]``; value and spans of the best below the limit."""
    num_rows, num_devices, num_cuts = source.shape
    span, hop = costs.span[order], costs.hop[np.ix_(order, order)]
    out = np.full((2**num_devices, num_rows, num_devices, num_cuts), np.inf)
    subsets = np.arange(2**num_devices)
    sizes = sum((subsets >> device) & 1 for device in range(num_devices))
    for size in range(1, num_devices + 1):
        for device in range(num_devices):
            here = subsets[(sizes == size) & (subsets >> device & 1 == 1)]
            into = _into(costs, out[here ^ 1 << device], hop[:, device], source[:, device], alone=size == 1)
            if np.isfinite(into).any():
                out[here, :, device] = _through_span(costs, into, span[device])
    totals = costs.combine(out, sink[None])
    subset, row, device, end = (int(index) for index in np.unravel_index(totals.argmin(), totals.shape))
    value = float(totals[subset, row, device, end])
    if not value < limit:
        return math.inf, ()
    spans: list[Span] = []
    while subset:
        before = subset ^ 1 << device
        into = _into(costs, out[before][None], hop[:, device], source[:, device], alone=not before)[0, row]
        start = int(costs.combine(into, span[device, :, end]).argmin())
        spans.append(Span(int(order[device]), start, end))
        if before:
            device = int(costs.combine(out[before, row, :, start], hop[:, device]).argmin())
        subset, end = before, start
    return value, tuple(reversed(spans))


def _into(costs: Costs, out: Floats, hop: Floats, source: Floats, *, alone: bool) -> Floats:
    """Cost ``[S, A, L+1]`` of being about to start on a device after each subset, from ``out`` ``[S, A, n, L+1]``."""
    if alone:
        return np.broadcast_to(source, (len(out), *source.shape))
    into = np.full(out[:, :, 0].shape, np.inf)
    for before in np.flatnonzero(np.isfinite(hop)):
        np.minimum(into, costs.combine(out[:, :, before], hop[before]), out=into)
    return into


def _through_span(costs: Costs, into: Floats, span: Floats) -> Floats:
    out = np.full(into.shape, np.inf)
    for end in np.flatnonzero(np.isfinite(span).any(axis=0)):
        starts = np.flatnonzero(np.isfinite(span[:, end]))
        lowest, highest = starts[0], starts[-1] + 1
        out[:, :, end] = costs.combine(into[:, :, lowest:highest], span[lowest:highest, end]).min(axis=2)
    return out

"""A proven lower bound on the bottleneck of every placement in any order.

Knows windows within a threshold; finds no placements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lingualinked.planning.placement.costs import Costs
from lingualinked.planning.placement.linear import minimise
from lingualinked.planning.placement.problem import Flags, Floats
from lingualinked.planning.placement.windows import Windows, thresholds

MAX_SUBSET_DEVICES = 16
"""For more, subsets are too many and a covering programme takes their place."""

MAX_CHAINED_CLOSERS = 16
"""For more closing devices, the links of rings are not looked at."""

MAX_SECONDS = 1.0
"""For one integral covering programme; undecided counts as possible."""


def bottleneck_bound(costs: Costs, devices: Sequence[int], high: float) -> float:
    """Find the least threshold at which a relaxation can still place all layers.

    The relaxation keeps that spans are contiguous, whole layers, on one device each, at their true place and cost. For
    few devices it is a programme over subsets with links included, exact but for devices that relay without holding
    layers. For more it is a covering programme: each device picks one of its maximal windows, or none, and every layer
    is covered; links are ignored there. The search over thresholds is that of Pinar and Aykanat [1]_.

    Parameters
    ----------
    costs : Costs
        Combined by the maximum.
    devices : sequence of int
        Those that may be used.
    high : float
        Cost of a known placement, or ``inf``.

    Returns
    -------
    float
        At most `high`; ``inf`` if no threshold suffices.

    References
    ----------
    .. [1] A. Pinar, C. Aykanat, "Fast optimal load balancing algorithms for 1D partitioning", J. Parallel Distrib.
       Comput. 64 (2004), 974-996.
    """
    values = thresholds(costs, devices, 0.0, high * (1 - 1e-12) if math.isfinite(high) else math.inf)
    if not len(values):
        return high

    def first_possible(test: Callable[[Windows], bool], low: int) -> int:
        return _first(len(values), low, lambda index: test(Windows.within(costs, devices, float(values[index]))))

    index = first_possible(_counts_suffice, 0)
    if len(devices) <= MAX_SUBSET_DEVICES:
        index = first_possible(_subsets_suffice, index)
    else:
        index = first_possible(lambda windows: _covers(windows, integral=False), index)
        index = first_possible(lambda windows: _covers(windows, integral=True), index)
    return float(values[index]) if index < len(values) else high


def _first(num_values: int, low: int, test: Callable[[int], bool]) -> int:
    """Give the least index that passes a monotone test, looking near `low` first."""
    step, high = 1, low
    while high < num_values and not test(high):
        low, high, step = high + 1, high + step, step * 4
    high = min(high, num_values)
    while low < high:
        middle = (low + high) // 2
        if test(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _counts_suffice(windows: Windows) -> bool:
    """Whether the largest windows have enough layers together; a ring's halves count as one window."""
    if windows.alone >= 0:
        return True
    gains = windows.gains(np.arange(windows.num_layers + 1.0))
    total = gains.sum()
    if total >= windows.num_layers:
        return True
    ring_gain = windows.ring_start + windows.num_layers - windows.ring_close
    return bool((total - gains[windows.ring_device] + ring_gain >= windows.num_layers).any())


def _subsets_suffice(windows: Windows) -> bool:
    if windows.alone >= 0:
        return True
    all_linked = windows.follows.sum() == len(windows.devices) * (len(windows.devices) - 1)
    if all_linked:
        plain = _any_closes(windows, _furthest(windows, np.zeros(1, dtype=int))[:, 0])
    else:
        plain = _chain_closes(windows)
    if plain or not len(windows.ring_start):
        return plain
    starts, row = np.unique(windows.ring_start, return_inverse=True)
    furthest = _furthest(windows, starts)
    others = len(furthest) - 1 ^ 1 << windows.ring_device
    possible = furthest[others, row] >= windows.ring_close
    closers = np.unique(windows.ring_device[possible])
    if all_linked or len(closers) > MAX_CHAINED_CLOSERS:
        return bool(possible.any())
    return any(_ring_closes(windows, int(device), possible & (windows.ring_device == device)) for device in closers)


@functools.lru_cache(maxsize=8)
def _levels(num_devices: int) -> list[list[NDArray[np.int64]]]:
    """Subsets by size, and within a size by each device they hold."""
    subsets = np.arange(2**num_devices)
    sizes = np.array([subset.bit_count() for subset in range(2**num_devices)])
    return [
        [subsets[(sizes == size) & (subsets >> device & 1 == 1)] for device in range(num_devices)]
        for size in range(1, num_devices + 1)
    ]


def _furthest(windows: Windows, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Furthest layer from each start for every subset of devices in its best order, ``[2**n, starts]``; no links."""
    num_devices = len(windows.devices)
    reach = windows.reach.astype(np.int16)
    furthest = np.tile(starts.astype(np.int16), (2**num_devices, 1))
    for level in _levels(num_devices):
        for device, subsets in enumerate(level):
            furthest[subsets] = np.maximum(furthest[subsets], reach[device][furthest[subsets ^ 1 << device]])
    return furthest.astype(int)


def _any_closes(windows: Windows, furthest: NDArray[np.int64]) -> bool:
    devices = np.arange(len(windows.devices))
    return bool(windows.closes[devices, furthest[len(furthest) - 1 ^ 1 << devices]].any())


def _chain_closes(windows: Windows) -> bool:
    """Whether a chain of devices joined by links closes; a device on the way may hold nothing."""
    furthest = _chains(windows, np.where(windows.reach[:, 0] > 0, windows.reach[:, 0], -1))
    subsets = np.arange(len(furthest))
    for device in np.flatnonzero(windows.closes.any(axis=1)):
        without = furthest[subsets >> device & 1 == 0][:, windows.follows[:, device]]
        if without.max(initial=-1) >= windows.closes[device].argmax():
            return True
    return False


def _ring_closes(windows: Windows, device: int, rings: Flags) -> bool:
    """Whether a chain leads from a device back to it, from the longest first half to the earliest second half."""
    starts = np.full(len(windows.devices), -1)
    starts[device] = windows.ring_start[rings].max()
    furthest = _chains(windows, starts)[:, windows.follows[:, device]]
    return bool(furthest.max(initial=-1) >= windows.ring_close[rings].min())


def _chains(windows: Windows, starts: NDArray[np.int64]) -> NDArray[np.int16]:
    """Furthest layer ``[2**n, n]`` of chains by their devices and the last one, from starts by device (-1: no start)."""
    num_devices = len(windows.devices)
    furthest = np.full((2**num_devices, num_devices), -1, dtype=np.int16)
    reach = np.concatenate([windows.reach, np.full((num_devices, 1), -1)], axis=1).astype(np.int16)  # -1 stays -1
    furthest[1 << np.arange(num_devices), np.arange(num_devices)] = starts
    for level in _levels(num_devices)[1:]:
        for device, subsets in enumerate(level):
            before = np.flatnonzero(windows.follows[:, device])
            if len(before):
                start = furthest[(subsets ^ 1 << device)[:, None], before].max(axis=1)
                furthest[subsets, device] = reach[device][start]
    return furthest


def _covers(windows: Windows, *, integral: bool) -> bool:
    """Whether windows, one per device, can cover every layer: by linear programming, fractions of windows too."""
    if windows.alone >= 0:
        return True
    starts, ends, device = _maximal(windows)
    num_rings, num_layers = len(windows.ring_start), windows.num_layers
    covered = np.zeros((num_layers, len(starts) + num_rings))
    layers = np.arange(num_layers)[:, None]
    covered[:, : len(starts)] = (layers >= starts) & (layers < ends)
    covered[:, len(starts) :] = (layers < windows.ring_start) | (layers >= windows.ring_close)
    device = np.concatenate([device, windows.ring_device])
    num_windows = len(device)
    picks = sparse.csr_matrix(
        (np.ones(num_windows), (device, np.arange(num_windows))), (len(windows.devices), num_windows)
    )
    gaps = sparse.identity(num_layers)
    answer = minimise(
        np.concatenate([np.zeros(num_windows), np.ones(num_layers)]),
        at_most=[
            (
                sparse.hstack([picks, sparse.csr_matrix((len(windows.devices), num_layers))]),
                np.ones(len(windows.devices)),
            ),
            (sparse.hstack([sparse.csr_matrix(-covered), -gaps]), -np.ones(num_layers)),
        ],
        integral=np.concatenate([np.ones(num_windows), np.zeros(num_layers)]) if integral else None,
        max_s=MAX_SECONDS,
    )
    return not answer.bound > 1e-6  # undecided counts as possible: the bound stays valid, only less tight


def _maximal(windows: Windows) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Windows that no other of the same device contains: starts, ends, devices."""
    rows: list[tuple[int, int, int]] = []
    for device, reach in enumerate(windows.reach):
        furthest = 0
        for start in range(windows.num_layers):
            if reach[start] > max(furthest, start):
                furthest = int(reach[start])
                rows.append((start, furthest, device))
        if windows.closes[device].any():
            rows.append((int(windows.closes[device].argmax()), windows.num_layers, device))
    table = np.array(rows, dtype=int).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def progress_of(costs: Costs, devices: Sequence[int]) -> Floats:
    """Give the progress that a layer means to a device of average kind: mean cost up to each layer.

    Parameters
    ----------
    costs : Costs
        Of the objective.
    devices : sequence of int
        Those that may be used.

    Returns
    -------
    ndarray
        float64 ``[L+1]``, from 0 to 1, not decreasing.
    """
    layers = np.arange(costs.num_layers)
    single = costs.span[list(devices)][:, layers, layers + 1]
    possible = np.isfinite(single)
    weights = np.where(possible, single, 0.0).sum(axis=0) / np.maximum(possible.sum(axis=0), 1)
    before = np.concatenate([[0.0], np.cumsum(np.maximum(weights, weights.mean() * 0.1 + 1e-300))])
    return np.asarray(before / before[-1])

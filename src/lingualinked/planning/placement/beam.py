"""A beam search for an order of devices that holds all layers within a threshold.

Knows windows within the threshold; not how the threshold is chosen, and no linear programme.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.placement.windows import Windows

ROOM = 4
"""Layers before the end at which a device may stop although it could go on: later devices need one each."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _States:
    """Partial placements: ring number or -1, devices used as bits, the last, layers placed, and parent."""

    ring: NDArray[np.int64]
    used: NDArray[np.uint64]
    last: NDArray[np.int64]
    end: NDArray[np.int64]
    parent: NDArray[np.int64]

    def at(self, rows: NDArray[np.int64]) -> _States:
        return _States(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def find_order(windows: Windows, progress: Floats, width: int, *, thorough: bool = False) -> tuple[int, ...] | None:
    """Search an order in which every device goes as far as it can and the last reaches the end.

    States with the same devices and the same last one are compared by how far they are; of the others those are kept
    that wasted least: whose progress, plus the most that each remaining device could still make, is largest.

    Parameters
    ----------
    windows : Windows
        Of at most 64 devices.
    progress : ndarray
        float64 ``[L+1]``, progress at each layer, not decreasing.
    width : int
        Number of states kept after each device.
    thorough : bool
        Whether devices may stop anywhere. Where links or permissions force a device to follow that can't hold the next
        layer, going less far is better.

    Returns
    -------
    tuple of int
        Devices in order, each once; the first may be the closing device of a ring. None if none was found.
    """
    if windows.alone >= 0:
        return (int(windows.devices[windows.alone]),)
    gains = windows.gains(progress)
    finest = 0 if thorough else windows.num_layers - 1 - ROOM  # ends from here on are told apart
    levels = [_starts(windows)]
    for _ in range(len(windows.devices)):
        states = levels[-1]
        found = _closing(windows, states)
        if found is not None:
            return _trace(windows, levels, *found)
        states = _successors(windows, states, thorough=thorough)
        left = np.where(_is_free(states.used, len(gains)), gains, 0.0).sum(axis=1)
        target = np.where(
            states.ring < 0, 1.0, progress[np.append(windows.ring_close, windows.num_layers)[states.ring]]
        )
        promise = progress[states.end] + left - target
        hopeful = np.flatnonzero(promise >= -1e-9)
        states, promise = states.at(hopeful), promise[hopeful]
        kept = _distinct(states, promise, width, finest)
        if not len(kept):
            return None
        levels.append(states.at(kept))
    return None


def _starts(windows: Windows) -> _States:
    """Give the states before the first hop: no device yet, or the first half of a ring."""
    num_rings = len(windows.ring_start)
    return _States(
        ring=np.arange(-1, num_rings),
        used=np.append(np.uint64(0), np.uint64(1) << windows.ring_device.astype(np.uint64)),
        last=np.append(-1, windows.ring_device),
        end=np.append(0, windows.ring_start),
        parent=np.full(num_rings + 1, -1),
    )


def _is_free(used: NDArray[np.uint64], num_devices: int) -> NDArray[np.bool_]:
    return np.asarray((used[:, None] >> np.arange(num_devices, dtype=np.uint64)) & np.uint64(1) == 0)


def _joined(windows: Windows, states: _States) -> NDArray[np.bool_]:
    """Whether each device is free and has a hop from the last one."""
    follows = np.vstack([windows.follows, np.ones(len(windows.devices), dtype=bool)])  # row -1: the caller
    return np.asarray(_is_free(states.used, len(windows.devices)) & follows[states.last])


def _closing(windows: Windows, states: _States) -> tuple[int, int] | None:
    """Find a state that one more span completes: its row, and the device that takes the span."""
    rings = np.flatnonzero((states.ring >= 0) & (states.parent >= 0))
    number = states.ring[rings]
    back = windows.follows[states.last[rings], windows.ring_device[number]]
    done = np.flatnonzero(back & (states.end[rings] >= windows.ring_close[number]))
    if len(done):
        return int(rings[done[0]]), -1
    completes = _joined(windows, states) & windows.closes[:, states.end].T & (states.ring < 0)[:, None]
    row, device = np.nonzero(completes)
    return (int(row[0]), int(device[0])) if len(row) else None


def _successors(windows: Windows, states: _States, *, thorough: bool) -> _States:
    """Extend each state as far as each device goes, and less far near the end; or to every end, if thorough."""
    joined, reach = _joined(windows, states), windows.reach[:, states.end].T
    last_end = windows.num_layers - 1
    parts = []
    for short in range(int((reach - states.end[:, None]).max(initial=0)) if thorough else ROOM):
        ends = reach - short
        row, device = np.nonzero(
            joined & (ends > states.end[:, None]) & (thorough | (short == 0) | (ends > last_end - ROOM))
        )
        used = states.used[row] | np.uint64(1) << device.astype(np.uint64)
        parts.append((states.ring[row], used, device, ends[row, device], row))
    if not parts:
        return states.at(np.zeros(0, dtype=int))
    return _States(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _distinct(states: _States, promise: Floats, width: int, finest: int) -> NDArray[np.int64]:
    """Give the rows of the most promising states, one for the same ring, devices, last device and end past `finest`."""
    rows = np.arange(len(promise))
    if len(promise) > 8 * width:
        rows = np.argpartition(-promise, 8 * width)[: 8 * width]
    label = ((states.ring[rows] + 1) * 65 + states.last[rows]) * (int(states.end.max(initial=0)) + 1)
    label += np.maximum(states.end[rows], finest)
    order = np.lexsort((-states.end[rows], label, states.used[rows]))
    used, label = states.used[rows][order], label[order]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (used[1:] != used[:-1]) | (label[1:] != label[:-1])
    rows = rows[order][is_new]
    return rows[np.argsort(-promise[rows], kind="stable")[:width]]


def _trace(windows: Windows, levels: list[_States], row: int, closing: int) -> tuple[int, ...]:
    order = [closing] if closing >= 0 else []
    for states in reversed(levels):
        if states.last[row] >= 0:
            order.append(int(states.last[row]))
        row = int(states.parent[row])
    return tuple(int(windows.devices[device]) for device in reversed(order))

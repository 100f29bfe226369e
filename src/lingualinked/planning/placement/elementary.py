"""The cheapest path that uses each device once (an elementary one), built stage by stage.

At prices of the programme's rows, a path costs no less than its own stages and the shortest way on from its end, which may
use devices twice, less the prices of devices that it has not used yet; what exceeds the best known is left out. Knows
networks and distances in them; no linear programme.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from lingualinked.planning.placement.arcs import Part
from lingualinked.planning.placement.network import Network
from lingualinked.planning.placement.problem import Flags, Floats, Ints, Placement, Span

_CHUNK = 1 << 20  # lengths that are formed at a time


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """Paths from the source that end behind a stage.

    Parameters
    ----------
    copy, device, end, front : ndarray
        int64 ``[N]``: of which copy, whose last stage, up to which layer; the layers of a ring's first half.
    used : ndarray
        bool ``[N, D]``, the devices of their stages.
    cost, surcharge : ndarray
        float64 ``[N]``: what they cost, and the prices of their stages less those of all devices.
    least : ndarray
        float64 ``[N]``, what no placement that begins so costs less than.
    parent : ndarray
        int64 ``[N]``, row of the path without the last stage.
    """

    copy: Ints
    device: Ints
    end: Ints
    front: Ints
    used: Flags
    cost: Floats
    surcharge: Floats
    least: Floats
    parent: Ints

    def __len__(self) -> int:
        return len(self.copy)

    def __getitem__(self, rows: Flags | Ints) -> _Labels:
        return _Labels(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Elementary:
    """The search for the cheapest elementary path of a network, at some prices.

    Parameters
    ----------
    network, priced : Network
        At its own costs, and with those that stages and halves of rings cost besides.
    close : dict of int to ndarray
        Costs of second halves beside first ones, as in `tables.Costs`.
    prices : ndarray
        float64 ``[D]``, of the devices' stages.
    """

    network: Network
    priced: Network
    close: dict[int, Floats]
    prices: Floats

    def search(self, limit: float, width: int) -> tuple[float, Placement, float]:
        """Search stage by stage, keeping the most promising paths, and among equal ones the cheapest.

        Parameters
        ----------
        limit : float
            What the placement may cost at most.
        width : int
            Paths that are kept after each stage.

        Returns
        -------
        tuple of float, tuple of Span and float
            Cost of the placement and itself, or the limit and none; and what no placement costs less than.
        """
        to_sink = self.priced.to_sink()
        levels: list[_Labels] = []
        best, goal, lost = limit, -1, math.inf
        labels = _joined(self._starts(limit, to_sink))
        while labels is not None:
            labels, least = self._most_promising(labels, width)
            lost = min(lost, least)
            levels.append(labels)
            cost = labels.cost + self._last(labels)
            row = int(cost.argmin())
            if cost[row] < best:
                best, goal, depth = float(cost[row]), row, len(levels) - 1
            labels = _joined(self._extended(labels, np.flatnonzero(labels.least < best), best, to_sink))
        placement = self._placement(levels[: depth + 1], goal) if goal >= 0 else ()
        return best, placement, min(lost, best)

    @property
    def _adjusted(self) -> Floats:
        """What first halves of rings cost besides their device's price, float64 ``[C, L+1]``."""
        front = np.where(np.isfinite(self.network.front), self.network.front, 0.0)
        price = np.where(self.network.ring < 0, 0.0, self.prices[self.network.ring])
        return np.where(np.isfinite(self.network.front), self.priced.front - front - price[:, None], 0.0)

    def _starts(self, limit: float, to_sink: tuple[Floats, Floats]) -> Iterator[Part]:
        network, given = self.network, float(self.prices.sum())
        for copy, ring in enumerate(network.ring.tolist()):
            if ring < 0:
                cost = network.enter[copy][:, None] + network.span[:, 0, :]
                surcharge = np.broadcast_to((self.prices - given)[:, None], cost.shape)
                least = cost + surcharge + to_sink[1][copy]
                rows = np.nonzero(least <= limit)
                device, end = rows
                front = np.zeros_like(end)
            else:
                cost = network.front[copy]
                surcharge = self._adjusted[copy] + self.prices[ring] - given
                least = cost + surcharge + to_sink[1][copy, ring]
                rows = np.nonzero(least <= limit)
                end = front = rows[0]
                device = np.full_like(end, ring)
            used = device[:, None] == np.arange(len(self.prices))
            none = np.full_like(end, -1)
            yield np.full_like(end, copy), device, end, front, used, cost[rows], surcharge[rows], least[rows], none

    def _last(self, labels: _Labels) -> Floats:
        """Return what it costs to end behind each path, or with the second half of its ring; ``inf`` where it can't."""
        network = self.network
        last = np.where(labels.end == network.num_layers, network.leave[labels.copy, labels.device], np.inf)
        for copy in np.flatnonzero(network.ring >= 0):
            ring = int(network.ring[copy])
            rows = np.flatnonzero((labels.copy == copy) & (labels.device != ring))
            last[rows] = network.hop[copy, labels.device[rows], ring]
            last[rows] += self.close[ring][labels.front[rows], labels.end[rows]]
        return last

    def _extended(self, labels: _Labels, rows: Ints, limit: float, to_sink: tuple[Floats, Floats]) -> Iterator[Part]:
        """Extend paths by one stage on each device that they have not used."""
        network, (into_to, out_to) = self.network, to_sink
        size = network.num_layers + 1
        for some in np.array_split(rows, 1 + len(rows) * len(self.prices) // _CHUNK):
            at = labels[some]
            cost = np.where(at.used, np.inf, at.cost[:, None] + network.hop[at.copy, at.device])
            path, device = np.nonzero(cost + at.surcharge[:, None] + into_to[at.copy, :, at.end] <= limit)
            for few in np.array_split(np.arange(len(path)), 1 + len(path) * size // _CHUNK):
                begun, new = path[few], device[few]
                total = cost[begun, new][:, None] + network.span[new, at.end[begun]]
                surcharge = at.surcharge[begun] + self.prices[new]
                least = total + (surcharge[:, None] + out_to[at.copy[begun], new])
                row, end = np.nonzero(least <= limit)
                before, new = at[begun[row]], new[row]
                used = before.used.copy()
                used[np.arange(len(new)), new] = True
                figures = total[row, end], surcharge[row], least[row, end]
                yield before.copy, new, end, before.front, used, *figures, some[begun[row]]

    def _placement(self, levels: list[_Labels], row: int) -> Placement:
        """Follow a path back to the source."""
        last = levels[-1][np.array([row])]
        ring, end, num_layers = int(self.network.ring[last.copy[0]]), int(last.end[0]), self.network.num_layers
        spans = [] if ring < 0 else [Span(ring, end, num_layers)]
        for level, before in zip(levels[::-1], [*levels[-2::-1], None], strict=True):
            parent = int(level.parent[row])
            start = int(before.end[parent]) if before is not None else 0
            spans.append(Span(int(level.device[row]), start, int(level.end[row])))
            row = parent
        return tuple(reversed(spans))

    def _most_promising(self, labels: _Labels, width: int) -> tuple[_Labels, float]:
        """Leave out paths that another one serves as well; keep those of least bound, and return the bound of others."""
        # 1) where hops cost nothing, a path serves as well as one that costs no less and is no further
        is_free = self.network.leads_everywhere[labels.copy, labels.device] & (labels.end < self.network.num_layers)
        last, at = np.where(is_free, -1, labels.device), np.where(is_free, -1, labels.end)
        alike = (at, last, labels.front, labels.copy, *np.packbits(labels.used, axis=1).T)
        order = np.lexsort((-labels.end, labels.cost, *alike))
        group = np.zeros(len(order), dtype=int)
        for key in alike:
            group[1:] |= key[order][1:] != key[order][:-1]
        furthest = np.maximum.accumulate(group.cumsum() * (self.network.num_layers + 1) + labels.end[order])
        labels = labels[order[np.diff(furthest, prepend=-1) > 0]]
        # 2) the most promising ones
        if len(labels) <= width:
            return labels, math.inf
        nearest = np.argpartition(labels.least, width)
        return labels[nearest[:width]], float(labels.least[nearest[width:]].min())


def _joined(parts: Iterator[Part]) -> _Labels | None:
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _Labels(*columns) if columns and len(columns[0]) else None

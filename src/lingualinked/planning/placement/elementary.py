"""The cheapest path that uses each device once (an elementary one), built stage by stage.

At prices of the programme's rows, a path costs no less than its own stages and the shortest way on from its end, which may
use devices twice, less the prices of devices that it has not used yet; what exceeds the best known is left out. Knows
networks and distances in them; no linear programme.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lingualinked.planning.placement.arcs import Part
from lingualinked.planning.placement.network import Network
from lingualinked.planning.placement.problem import Flags, Floats, Ints, Placement, Span
from lingualinked.planning.placement.tables import TOLERANCE

_CHUNK = 1 << 20  # lengths that are formed at a time


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """Paths from the source that end behind a stage: copy, last device, layers, devices used, costs, bound, parent."""

    copy: Ints
    device: Ints
    end: Ints
    front: Ints  # layers of the first half of a ring
    used: Flags  # [N, D]
    cost: Floats  # [N, R]
    surcharge: Floats  # prices of their stages less those of all devices
    least: Floats  # what no placement that begins so costs less than, in the costs that rank
    parent: Ints  # row of the path without the last stage

    def __len__(self) -> int:
        return len(self.copy)

    def __getitem__(self, rows: Flags | Ints) -> _Labels:
        return _Labels(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


class Elementary:
    """The search for the cheapest elementary path of a network, guided by prices.

    Parameters
    ----------
    networks : sequence of Network
        One network at one or two kinds of costs. Where there are two, the first ones may not exceed the limit, and the
        second ones are to be least.
    closes : sequence of dict of int to ndarray
        Of each kind, the costs of second halves of rings beside first ones, as in `tables.Costs`.
    priced : Network
        The first one, with what stages and halves of rings cost besides.
    prices : ndarray
        float64 ``[D]``, of the devices' stages.
    given : float
        By how much the length of a path may exceed what it costs: the sum of the prices, and a little for rounding.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        closes: Sequence[dict[int, Floats]],
        priced: Network,
        prices: Floats,
        given: float,
    ) -> None:
        self._network, self._priced, self._prices, self._given = networks[-1], priced, prices, given
        self._ring = self._network.ring
        self._hop, self._span, self._enter, self._leave, self._front = (
            np.stack([getattr(network, name) for network in networks], axis=-1)
            for name in ("hop", "span", "enter", "leave", "front")
        )
        self._close = {device: np.stack([close[device] for close in closes], axis=-1) for device in closes[0]}
        self._num_costs = len(networks)
        self._to_sink = priced.to_sink()
        self._ranks_to_sink = networks[-1].to_sink() if self._num_costs > 1 else self._to_sink

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
        levels: list[_Labels] = []
        best, goal, lost = (limit if self._num_costs == 1 else math.inf), -1, math.inf
        labels = _joined(self._starts(limit))
        while labels is not None:
            labels, least = self._most_promising(labels, limit, width)
            lost = min(lost, least)
            levels.append(labels)
            cost = labels.cost + self._last(labels)
            rank = np.where(cost[:, 0] <= limit, cost[:, -1], np.inf)
            row = int(rank.argmin())
            if rank[row] < best:
                best, goal, depth = float(rank[row]), row, len(levels) - 1
            labels = _joined(self._extended(labels, np.flatnonzero(labels.least < best), limit, best))
        placement = self._placement(levels[: depth + 1], goal) if goal >= 0 else ()
        return best, placement, min(lost, best)

    def _bounds(self, cost: Floats, surcharge: Floats, copy: Any, device: Any, end: Any) -> tuple[Floats, Floats]:
        """Return what placements that begin so cost at least, in the costs that the limit is on and in those that rank."""
        least = cost[..., 0] + (surcharge + self._to_sink[1][copy, device, end])
        return least, least if self._num_costs == 1 else cost[..., -1] + self._ranks_to_sink[1][copy, device, end]

    def _starts(self, limit: float) -> Iterator[Part]:
        given, every = self._given, np.arange(self._span.shape[1])
        for copy, ring in enumerate(self._ring.tolist()):
            if ring < 0:
                cost = self._enter[copy][:, None] + self._span[:, 0]
                device, end = np.broadcast_arrays(np.arange(len(self._prices))[:, None], every)
                surcharge, front = self._prices[device] - given, np.zeros_like(end)
            else:
                cost, device, end, front = self._front[copy], np.full_like(every, ring), every, every
                surcharge = self._halves[copy] + self._prices[ring] - given
            least, rank = self._bounds(cost, surcharge, copy, device, end)
            rows = np.nonzero(least <= limit)
            used = device[rows][:, None] == np.arange(len(self._prices))
            none = np.full_like(end[rows], -1)
            figures = cost[rows], surcharge[rows], rank[rows]
            yield none * 0 + copy, device[rows], end[rows], front[rows], used, *figures, none

    @property
    def _halves(self) -> Floats:
        """What first halves of rings cost besides their device's price, float64 ``[C, L+1]``."""
        cost = np.where(np.isfinite(self._front[..., 0]), self._front[..., 0], 0.0)
        price = np.where(self._ring < 0, 0.0, self._prices[self._ring])
        return np.where(np.isfinite(self._front[..., 0]), self._priced.front - cost - price[:, None], 0.0)

    def _last(self, labels: _Labels) -> Floats:
        """Return what it costs to end behind each path, or with the second half of its ring; ``inf`` where it can't."""
        is_whole = labels.end == self._network.num_layers
        last = np.where(is_whole[:, None], self._leave[labels.copy, labels.device], np.inf)
        for copy in np.flatnonzero(self._ring >= 0):
            ring = int(self._ring[copy])
            rows = np.flatnonzero((labels.copy == copy) & (labels.device != ring))
            last[rows] = self._hop[copy, labels.device[rows], ring]
            last[rows] += self._close[ring][labels.front[rows], labels.end[rows]]
        return last

    def _extended(self, labels: _Labels, rows: Ints, limit: float, best: float) -> Iterator[Part]:
        """Extend paths by one stage on each device that they have not used."""
        size, bound = self._network.num_layers + 1, min(limit, best) if self._num_costs == 1 else limit
        for some in np.array_split(rows, 1 + len(rows) * len(self._prices) // _CHUNK):
            at = labels[some]
            cost = np.where(at.used[:, :, None], np.inf, at.cost[:, None] + self._hop[at.copy, at.device])
            least = cost[..., 0] + at.surcharge[:, None] + self._to_sink[0][at.copy, :, at.end]
            path, device = np.nonzero(least <= bound)
            for few in np.array_split(np.arange(len(path)), 1 + len(path) * size // _CHUNK):
                begun, new = path[few], device[few]
                total = cost[begun, new][:, None] + self._span[new, at.end[begun]]
                surcharge = at.surcharge[begun] + self._prices[new]
                every = at.copy[begun][:, None], new[:, None], np.arange(size)
                least, rank = self._bounds(total, surcharge[:, None], *every)
                row, end = np.nonzero((least <= bound) & (rank <= best))
                before, new = at[begun[row]], new[row]
                used = before.used.copy()
                used[np.arange(len(new)), new] = True
                figures = total[row, end], surcharge[row], rank[row, end]
                yield before.copy, new, end, before.front, used, *figures, some[begun[row]]

    def _placement(self, levels: list[_Labels], row: int) -> Placement:
        """Follow a path back to the source."""
        last = levels[-1][np.array([row])]
        ring, end = int(self._ring[last.copy[0]]), int(last.end[0])
        spans = [] if ring < 0 else [Span(ring, end, self._network.num_layers)]
        for level, before in zip(levels[::-1], [*levels[-2::-1], None], strict=True):
            parent = int(level.parent[row])
            start = int(before.end[parent]) if before is not None else 0
            spans.append(Span(int(level.device[row]), start, int(level.end[row])))
            row = parent
        return tuple(reversed(spans))

    def _most_promising(self, labels: _Labels, limit: float, width: int) -> tuple[_Labels, float]:
        """Leave out paths that another one serves as well; keep those of least bound, and return the bound of others."""
        # 1) where hops cost nothing, a path serves as well as one that costs no less and is no further
        is_free = self._network.leads_everywhere[labels.copy, labels.device] & (labels.end < self._network.num_layers)
        is_free &= self._num_costs == 1
        last, at = np.where(is_free, -1, labels.device), np.where(is_free, -1, labels.end)
        limited = tuple(np.round(labels.cost[:, :-1].T / max(limit * TOLERANCE, np.finfo(float).tiny)))
        alike = (*limited, at, last, labels.front, labels.copy, *np.packbits(labels.used, axis=1).T)
        order = np.lexsort((-labels.end, labels.cost[:, -1], *alike))
        group = np.zeros(len(order), dtype=int)
        for key in alike:
            group[1:] |= key[order][1:] != key[order][:-1]
        furthest = np.maximum.accumulate(group.cumsum() * (self._network.num_layers + 1) + labels.end[order])
        labels = labels[order[np.diff(furthest, prepend=-1) > 0]]
        # 2) the most promising ones
        if len(labels) <= width:
            return labels, math.inf
        nearest = np.argpartition(labels.least, width)
        return labels[nearest[:width]], float(labels.least[nearest[width:]].min())


def _joined(parts: Iterator[Part]) -> _Labels | None:
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _Labels(*columns) if columns and len(columns[0]) else None

"""The arcs of a network that lie on short enough paths, one column of the linear programme each.

Knows networks and lengths of paths; not how a programme is solved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lingualinked.planning.placement.network import Network
from lingualinked.planning.placement.problem import Flags, Floats, Ints, Placement, Span

Part: TypeAlias = tuple[NDArray[Any], ...]

SOURCE, SINK = 0, 1
SPAN, FRONT, CLOSE, ENTER, LEAVE, HOP, HUB = range(7)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Arcs:
    """Arcs of a network between numbered nodes.

    Parameters
    ----------
    kind, copy : ndarray
        int64 ``[A]``: SPAN, FRONT and CLOSE (halves of a ring), ENTER, LEAVE, HOP; HUB: to or from a node at a layer
        that stands for all hops there that cost nothing.
    device, start, end : ndarray
        int64 ``[A]``: whose span, and of which layers; of a hop from where, at which layer, and to where.
    tail, head : ndarray
        int64 ``[A]``, nodes.
    length : ndarray
        float64 ``[A]``, of the shortest path through each arc.
    """

    kind: Ints
    copy: Ints
    device: Ints
    start: Ints
    end: Ints
    tail: Ints
    head: Ints
    length: Floats

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, rows: Flags | Ints) -> Arcs:
        return Arcs(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @property
    def keys(self) -> Ints:
        """One number for each arc, by which it is known again."""
        return np.asarray(self.tail * 2**32 + self.head)

    def nearest(self, count: int) -> Flags:
        """Mark the arcs on the shortest paths."""
        marked = np.ones(len(self), dtype=bool)
        if count < len(self):
            marked[np.argpartition(self.length, count)[count:]] = False
        return marked

    def costs_in(self, network: Network) -> Floats:
        """Return what the arcs cost in a network, float64 ``[A]``."""
        cost = np.zeros(len(self))
        for kind, table, index in (
            (SPAN, network.span, (self.device, self.start, self.end)),
            (FRONT, network.front, (self.copy, self.end)),
            (CLOSE, network.close, (self.copy, self.start)),
            (ENTER, network.enter, (self.copy, self.device)),
            (LEAVE, network.leave, (self.copy, self.device)),
            (HOP, network.hop, (self.copy, self.device, self.end)),
        ):
            rows = self.kind == kind
            cost[rows] = table[tuple(each[rows] for each in index)]
        return cost

    def placement(self, flow: Floats) -> Placement:
        """Read the spans off an integral flow."""
        rows = np.flatnonzero((flow > 0.5) & (self.kind <= CLOSE))
        rows = rows[np.argsort(self.start[rows])]
        return tuple(Span(int(self.device[row]), int(self.start[row]), int(self.end[row])) for row in rows)

    def order(self, flow: Floats) -> tuple[int, ...]:
        """Return the devices in the order in which a fractional flow has them, by the middle of their layers."""
        rows = np.flatnonzero((flow > 1e-9) & ((self.kind == SPAN) | (self.kind == FRONT)))
        share = np.bincount(self.device[rows], flow[rows])
        middle = np.bincount(self.device[rows], flow[rows] * (self.start[rows] + self.end[rows]))
        used = np.flatnonzero(share)
        return tuple(used[np.argsort(middle[used] / share[used], kind="stable")].tolist())


def arcs_within(
    network: Network, priced: Network, limit: float, most: int | None, pool: Ints | None
) -> tuple[Arcs, float]:
    """List the arcs of a network on whose shortest path, at other costs, is no longer than a limit.

    Parameters
    ----------
    network, priced : Network
        The same one at its own costs and at those that count here.
    limit : float
        Of the length.
    most : int or None
        Where a copy has more arcs, the nearest ones suffice, one more than this; ``None``: all.
    pool : ndarray or None
        int64, keys of arcs that are not left out for that.

    Returns
    -------
    tuple of Arcs and float
        The arcs, more than `most` only if there are more; and the length of the shortest path; ``inf`` if there is none.
    """
    from_source, to_sink = priced.from_source(), priced.to_sink()
    kept = []
    lengths_of_copies = _shortest(priced, to_sink)
    for copy, best in enumerate(lengths_of_copies):
        if best <= limit:
            lengths = (*(each[copy] for each in from_source), *(each[copy] for each in to_sink))
            arcs = _joined(_parts(network, priced, copy, lengths, limit))
            if most is not None and len(arcs) > most:
                marked = arcs.nearest(most + 1)
                arcs = arcs[marked if pool is None else marked | np.isin(arcs.keys, pool)]
            kept.append(tuple(getattr(arcs, field.name) for field in dataclasses.fields(arcs)))
    shortest = min(lengths_of_copies)
    if not kept:
        none = np.empty(0, dtype=int)
        return Arcs(none, none, none, none, none, none, none, np.empty(0)), shortest
    return _joined(kept), shortest


def shortest_length(network: Network) -> float:
    """Return the length of the shortest path of a network; ``inf`` if there is none."""
    return min(_shortest(network, network.to_sink()))


def _shortest(network: Network, to_sink: tuple[Floats, Floats]) -> list[float]:
    """Return the length of the shortest path in each copy of a network, from the distances to its sink."""
    into, out = to_sink
    return [
        float((network.enter[copy] + into[copy, :, 0]).min())
        if closing < 0
        else float((network.front[copy] + out[copy, closing]).min())
        for copy, closing in enumerate(network.ring.tolist())
    ]


def _joined(parts: Iterable[Part]) -> Arcs:
    return Arcs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _parts(network: Network, priced: Network, copy: int, lengths: tuple[Floats, ...], limit: float) -> Iterator[Part]:
    """List the columns of `Arcs`, kind by kind."""
    into_from, out_from, into_to, out_to = lengths
    num_devices, num_cuts = into_from.shape
    closing = int(network.ring[copy])

    def into(device: Any, layer: Any) -> Ints:
        return np.asarray(2 + 2 * ((copy * num_devices + device) * num_cuts + layer))

    def out(device: Any, layer: Any) -> Ints:
        return into(device, layer) + 1

    def part(kind: int, length: Floats, device: Ints, start: Any, end: Any, tail: Any, head: Any) -> Part:
        columns = [np.broadcast_to(each, device.shape) for each in (kind, copy, device, start, end, tail, head)]
        return (*columns, length)

    through = into_from[:, :, None] + (priced.span + out_to[:, None, :])
    if closing >= 0:
        through[closing] = np.inf
    d, i, j = np.nonzero(through <= limit)
    yield part(SPAN, through[d, i, j], d, i, j, into(d, i), out(d, j))
    if closing < 0:
        enter, leave = network.enter[copy] + into_to[:, 0], out_from[:, -1] + network.leave[copy]
        (d,) = np.nonzero(enter <= limit)
        yield part(ENTER, enter[d], d, 0, 0, SOURCE, into(d, 0))
        (d,) = np.nonzero(leave <= limit)
        yield part(LEAVE, leave[d], d, num_cuts - 1, num_cuts - 1, out(d, num_cuts - 1), SINK)
    else:
        front, close = priced.front[copy] + out_to[closing], into_from[closing] + priced.close[copy]
        (b,) = np.nonzero(front <= limit)
        yield part(FRONT, front[b], np.full_like(b, closing), 0, b, SOURCE, out(closing, b))
        (b,) = np.nonzero(close <= limit)
        yield part(CLOSE, close[b], np.full_like(b, closing), b, num_cuts - 1, into(closing, b), SINK)
    through = out_from[:, None, :] + network.hop[copy][:, :, None] + into_to
    # hops that cost nothing go through one node for each layer: as many arcs as devices, not as pairs
    free = network.leads_everywhere[copy]
    hub_from, hub_to = np.where(free[:, None], out_from, np.inf).min(axis=0), into_to.min(axis=0)
    hub = 2 + 2 * len(network.ring) * num_devices * num_cuts + copy * num_cuts
    length = np.where(free[:, None], out_from + hub_to, np.inf)
    d, b = np.nonzero(length <= limit)
    yield part(HUB, length[d, b], d, b, b, out(d, b), hub + b)
    length = hub_from + into_to
    d, b = np.nonzero(length <= limit)
    yield part(HUB, length[d, b], d, b, b, hub + b, into(d, b))
    through[free] = np.inf
    d, k, b = np.nonzero(through <= limit)
    yield part(HOP, through[d, k, b], d, b, k, out(d, b), into(k, b))

"""The layered network of all placements along one order of devices, and the distances in it.

Knows costs by position and layer; no linear programme, and not where the order comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lingualinked.planning.placement.costs import Costs
from lingualinked.planning.placement.problem import Floats, Placement, Span


@dataclasses.dataclass(frozen=True, slots=True)
class Ring:
    """The start of a placement that returns to its first device: layers ``[0, end)`` on that device."""

    device: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A layered acyclic network: each path from source to sink is a placement, and each placement is a path.

    Node ``in(p, i)``: the device at position p of the order starts at layer i; node ``out(p, j)``: it has ended before
    layer j. Arcs: spans ``in(p, i) -> out(p, j)``, hops ``out(p, i) -> in(q, i)`` for ``p < q``, and those from the
    source and to the sink. In the network of a ring the source stands behind the first half on the closing device
    and the sink before its second half.

    Parameters
    ----------
    devices : tuple of int
        The order, of n devices.
    ring : Ring or None
        What every placement of the network starts with, if it is a ring.
    combine : ufunc
        See `Costs`.
    source, sink : ndarray
        float64 ``[n, L+1]``, costs of the arcs from the source to ``in(p, i)``, and from ``out(p, j)`` to the sink.
    span : ndarray
        float64 ``[n, L+1, L+1]``.
    hop : ndarray
        float64 ``[n, n]``; ``inf`` unless ``p < q``.
    """

    devices: tuple[int, ...]
    ring: Ring | None
    combine: np.ufunc
    source: Floats
    sink: Floats
    span: Floats
    hop: Floats

    @classmethod
    def of(cls, costs: Costs, devices: Sequence[int], ring: Ring | None = None) -> Network:
        """Lay out the placements along an order; any device of it may be skipped.

        Parameters
        ----------
        costs : Costs
            Of the objective.
        devices : sequence of int
            The order; without the ring's device.
        ring : Ring, optional
            What the placement starts with; None: with a device of the order.

        Returns
        -------
        Network
            With 2 n (L+1) nodes besides source and sink.
        """
        order = np.array(devices, dtype=int)
        size = (len(order), costs.num_layers + 1)
        source, sink = np.full(size, np.inf), np.full(size, np.inf)
        if ring is None:
            source[:, 0] = costs.enter[order]
            sink[:, -1] = costs.leave[order]
        else:
            source[:, ring.end] = costs.combine(costs.front[ring.device, ring.end], costs.hop[ring.device, order])
            sink = costs.combine(costs.hop[order, ring.device][:, None], costs.close[ring.device, ring.end][None, :])
        hop = costs.hop[np.ix_(order, order)].copy()
        hop[np.tri(len(order), dtype=bool)] = np.inf
        return cls(tuple(devices), ring, costs.combine, source, sink, costs.span[order], hop)

    @classmethod
    def relaxed_ring(cls, costs: Costs, devices: Sequence[int], device: int) -> Network:
        """Lay out the rings on a device for all first halves at once, each second half at its cheapest.

        Parameters
        ----------
        costs : Costs
            Of the objective.
        devices : sequence of int
            The order between the two halves.
        device : int
            The closing device.

        Returns
        -------
        Network
            Its distances bound those of every single ring's network from below.
        """
        order = np.array(devices, dtype=int)
        front = np.where(np.isfinite(costs.close[device]).any(axis=1), costs.front[device], np.inf)
        source = costs.combine(front[None, :], costs.hop[device, order][:, None])
        sink = costs.combine(costs.hop[order, device][:, None], costs.close[device].min(axis=0)[None, :])
        hop = costs.hop[np.ix_(order, order)].copy()
        hop[np.tri(len(order), dtype=bool)] = np.inf
        return cls(tuple(devices), Ring(device, 0), costs.combine, source, sink, costs.span[order], hop)

    def from_source(self) -> tuple[Floats, Floats]:
        """Give the distance from the source to every node.

        Returns
        -------
        tuple of ndarray
            float64 ``[n, L+1]`` each, of ``in`` and of ``out``.
        """
        into, out = self.source.copy(), np.empty_like(self.source)
        for p in range(len(self.devices)):
            if p:
                np.minimum(into[p], self.combine(out[:p], self.hop[:p, p, None]).min(axis=0), out=into[p])
            out[p] = self.combine(into[p][:, None], self.span[p]).min(axis=0)
        return into, out

    def to_sink(self) -> tuple[Floats, Floats]:
        """Give the distance from every node to the sink.

        Returns
        -------
        tuple of ndarray
            float64 ``[n, L+1]`` each, of ``in`` and of ``out``.
        """
        into, out = np.empty_like(self.sink), self.sink.copy()
        for p in reversed(range(len(self.devices))):
            if p + 1 < len(self.devices):
                rest = self.combine(into[p + 1 :], self.hop[p, p + 1 :, None]).min(axis=0)
                np.minimum(out[p], rest, out=out[p])
            into[p] = self.combine(self.span[p], out[p][None, :]).min(axis=1)
        return into, out

    def best(self) -> float:
        """Give the length of the shortest path; ``inf`` if there is none."""
        if not self.devices:
            return np.inf
        out = self.from_source()[1]
        return float(self.combine(out, self.sink).min())

    def shortest(self) -> Placement:
        """Give a shortest path as spans; the network must have a path."""
        into, out = self.to_sink()
        totals = self.combine(self.source, into)
        position, layer = (int(index) for index in np.unravel_index(totals.argmin(), totals.shape))
        spans = [] if self.ring is None else [Span(self.ring.device, 0, self.ring.end)]
        while True:
            end = int(self.combine(self.span[position, layer], out[position]).argmin())
            spans.append(Span(self.devices[position], layer, end))
            onward = self.combine(self.hop[position], into[:, end])
            following = int(onward.argmin())
            if self.sink[position, end] <= onward[following]:
                break
            position, layer = following, end
        if self.ring is not None:
            spans.append(Span(self.ring.device, end, self.source.shape[1] - 1))
        return tuple(spans)

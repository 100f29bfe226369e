"""The network whose paths are the placements, and the shortest distances in it.

Knows costs by device and layer; no linear programme.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lingualinked.planning.placement.problem import Flags, Floats, Ints, Placement, Span
from lingualinked.planning.placement.tables import Costs

_BATCH_NODES = 1 << 22  # of the networks that are laid out at a time
_MAX_RINGS = 4  # devices of an order whose rings are tried


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """A layered network without cycles, in C copies: each placement is a path in one of them.

    Nodes ``in(c, d, b)`` and ``out(c, d, b)``: in copy c, device d starts at layer b, or has ended before it. Spans lead
    from ``in(c, d, i)`` to ``out(c, d, j)``, hops from ``out(c, d, b)`` to ``in(c, k, b)``. In a plain copy the source
    leads to ``in(c, d, 0)`` and ``out(c, d, L)`` to the sink. A ring's copy has a closing device: for it the source leads
    to ``out(c, d, a)``, its first half, and ``in(c, d, b)`` to the sink, its second half.

    A path may use a device more than once; what forbids that is not known here.

    Parameters
    ----------
    combine : ufunc
        ``np.add`` or ``np.maximum``; 0 is neutral for both.
    span : ndarray
        float64 ``[D, L+1, L+1]``.
    hop : ndarray
        float64 ``[C, D, D]``.
    enter, leave : ndarray
        float64 ``[C, D]``; ``inf`` in the copies of rings.
    ring : ndarray
        int64 ``[C]``, the closing device, -1 in plain copies.
    front, close : ndarray
        float64 ``[C, L+1]``; ``inf`` in plain copies.
    """

    combine: np.ufunc
    span: Floats
    hop: Floats
    enter: Floats
    leave: Floats
    ring: Ints
    front: Floats
    close: Floats

    @classmethod
    def of(cls, costs: Costs, order: Sequence[int] | None = None) -> Network:
        """Lay out all placements on some devices, with one copy for each device that may close a ring.

        Parameters
        ----------
        costs : Costs
            Additive ones.
        order : sequence of int or None
            Devices in pipeline order: hops lead forward alone, and back to the closing device. ``None``: all devices
            in any order.
        """
        copies = [_plain(costs, order)]
        for device, table in costs.close.items():
            if order is None or device in order:
                halves = np.asarray(np.isfinite(table).any(axis=1))
                copies.append(_ring(costs, order, device, halves, table.min(axis=0)))
        return cls._joined(np.add, costs, copies)

    @classmethod
    def along(cls, costs: Costs, orders: Sequence[Sequence[int]], combine: np.ufunc) -> Network:
        """Lay out the placements along some orders, with one copy for each order and first half of a ring."""
        copies = []
        for order in orders:
            copies.append(_plain(costs, order))
            for device in [device for device in order if device in costs.close][:_MAX_RINGS]:
                table = costs.close[device]
                ends = np.flatnonzero(np.isfinite(table).any(axis=1))
                copies += [_ring(costs, order, device, np.arange(len(table)) == end, table[end]) for end in ends]
        return cls._joined(combine, costs, copies)

    @classmethod
    def _joined(cls, combine: np.ufunc, costs: Costs, copies: list[dict[str, Floats | int]]) -> Network:
        fields = {name: np.stack([np.asarray(copy[name]) for copy in copies]) for name in copies[0]}
        return cls(combine=combine, span=costs.span, **fields)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.span.shape[1]) - 1

    @property
    def leads_everywhere(self) -> Flags:
        """Say from which devices hops lead to all others at no cost, bool ``[C, D]``."""
        return np.asarray(((self.hop == 0) | np.eye(self.hop.shape[1], dtype=bool)).all(axis=2))

    @property
    def ceiling(self) -> float:
        """What no path that uses each device once costs more than; at least a little."""

        def most(costs: Floats) -> float:
            return float(np.where(np.isfinite(costs), costs, 0.0).max(initial=0.0))

        ends = sum(map(most, (self.enter, self.leave, self.front, self.close)))
        return 2 * (ends + sum(map(most, self.span)) + most(self.hop) * (self.hop.shape[1] + 1)) or 1.0

    def priced(self, prices: Floats, front: Floats, close: Floats) -> Network:
        """Return the network in which every stage of a device costs a price besides, and rings' halves others."""
        device_prices = np.where(self.ring < 0, 0.0, prices[self.ring])[:, None]
        return dataclasses.replace(
            self,
            span=self.span + prices[:, None, None],
            front=self.front + device_prices + front,
            close=self.close + close,
        )

    def from_source(self) -> tuple[Floats, Floats]:
        """Return the distances from the source to every ``in`` and to every ``out``, float64 ``[C, D, L+1]`` each."""
        rings = np.flatnonzero(self.ring >= 0)
        closing = self.ring[rings]
        size = (*self.enter.shape, self.num_layers + 1)
        into, out = np.full(size, np.inf), np.full(size, np.inf)
        into[:, :, 0] = self.enter
        for layer in range(1, self.num_layers + 1):
            ended = self.combine(into[:, :, :layer], self.span[:, :layer, layer]).min(axis=2)
            ended[rings, closing] = self.front[rings, layer]
            out[:, :, layer] = ended
            into[:, :, layer] = self.combine(ended[:, :, None], self.hop).min(axis=1)
        return into, out

    def to_sink(self) -> tuple[Floats, Floats]:
        """Return the distances from every ``in`` and from every ``out`` to the sink, float64 ``[C, D, L+1]`` each."""
        rings = np.flatnonzero(self.ring >= 0)
        closing = self.ring[rings]
        size = (*self.enter.shape, self.num_layers + 1)
        into, out = np.full(size, np.inf), np.full(size, np.inf)
        out[:, :, -1] = self.leave
        for layer in reversed(range(self.num_layers)):
            started = self.combine(self.span[:, layer, layer + 1 :], out[:, :, layer + 1 :]).min(axis=2)
            started[rings, closing] = self.close[rings, layer]
            into[:, :, layer] = started
            out[:, :, layer] = self.combine(self.hop, started[:, None, :]).min(axis=2)
        return into, out

    def shortest(self) -> tuple[float, Placement]:
        """Return the length of a shortest path and its spans; ``inf`` and none if there is no path."""
        into, out = self.to_sink()
        starts = np.where(self.ring < 0, self.combine(self.enter, into[:, :, 0]).min(axis=1), np.inf)
        rings = np.flatnonzero(self.ring >= 0)
        halves = self.combine(self.front[rings], out[rings, self.ring[rings]])
        starts[rings] = halves.min(axis=1)
        copy = int(starts.argmin())
        if starts[copy] == np.inf:
            return np.inf, ()
        spans, layer, closing = [], 0, int(self.ring[copy])
        if closing < 0:
            device = int(self.combine(self.enter[copy], into[copy, :, 0]).argmin())
        else:
            layer = int(halves[int(np.flatnonzero(rings == copy)[0])].argmin())
            spans.append(Span(closing, 0, layer))
            device = int(self.combine(self.hop[copy, closing], into[copy, :, layer]).argmin())
        while device != closing:
            end = int(self.combine(self.span[device, layer], out[copy, device]).argmin())
            spans.append(Span(device, layer, end))
            layer = end
            if end == self.num_layers:
                return float(starts[copy]), tuple(spans)
            device = int(self.combine(self.hop[copy, device], into[copy, :, end]).argmin())
        return float(starts[copy]), (*spans, Span(closing, layer, self.num_layers))


def shortest_along(
    costs: Costs, orders: Sequence[Sequence[int]], combine: np.ufunc = np.add
) -> tuple[float, Placement]:
    """Find the cheapest placement whose devices keep one of some orders, by dynamic programming; any may be skipped.

    The device of a ring comes before the others that the ring uses, and is among the first four that may close one. Its
    halves share memory and time, so each first half has a copy of the network of its own.

    Returns
    -------
    tuple of float and tuple of Span
        Its cost and the placement; ``inf`` and an empty one if the orders allow none.
    """
    value: float = np.inf
    placement: Placement = ()
    num_nodes = costs.front.size * (1 + costs.front.shape[1] * min(len(costs.close), _MAX_RINGS))
    batch = max(1, _BATCH_NODES // num_nodes)
    for start in range(0, len(orders), batch):
        found = Network.along(costs, orders[start : start + batch], combine).shortest()
        if found[0] < value:
            value, placement = found
    return value, placement


def _hops(costs: Costs, order: Sequence[int] | None, closing: int = -1) -> Floats:
    """Return the hops that lead forward in an order, or back to the closing device; all of them where there is none."""
    if order is None:
        return costs.hop
    place = np.full(len(costs.hop), -1)
    place[list(order)] = np.arange(len(order))
    is_allowed = (place[:, None] < place) & (place[:, None] >= 0)
    if closing >= 0:
        is_allowed[:, closing] |= place > place[closing]
    return np.where(is_allowed, costs.hop, np.inf)


def _plain(costs: Costs, order: Sequence[int] | None) -> dict[str, Floats | int]:
    is_used = np.full(len(costs.hop), order is None)
    is_used[list(order or ())] = True
    none = np.full(costs.front.shape[1], np.inf)
    enter, leave = (np.where(is_used, cost, np.inf) for cost in (costs.enter, costs.leave))
    return {"hop": _hops(costs, order), "enter": enter, "leave": leave, "ring": -1, "front": none, "close": none}


def _ring(
    costs: Costs, order: Sequence[int] | None, device: int, halves: Flags, close: Floats
) -> dict[str, Floats | int]:
    hop, none = _hops(costs, order, device), np.full(len(costs.hop), np.inf)
    front = np.where(halves, costs.front[device], np.inf)
    return {"hop": hop, "enter": none, "leave": none, "ring": device, "front": front, "close": close}

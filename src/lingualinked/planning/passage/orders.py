"""Which devices to empty, one after the other, so that they can take another place in the pipeline.

Knows orders of devices, and whether some of them can hold the model without the others.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
from collections.abc import Collection, Iterator

from lingualinked.planning.passage.fill import can_hold
from lingualinked.planning.passage.holdings import Ledger

MAX_ORDERS = 30
"""So many orders are expanded."""

Order = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Relocation:
    """A device that takes another place: it is emptied, and the others hold the model meanwhile.

    Parameters
    ----------
    device : str
        The device.
    without : tuple of str
        The others that may hold layers meanwhile, in their order.
    order : tuple of str
        All, with the device in its new place.
    """

    device: str
    without: Order
    order: Order


class Orders:
    """Orders of devices, and the ways between them.

    Between two plans along one order there is always a way (see `waves`), so devices out of order are all that has to be
    searched for: a device can change its place if the others can hold the model without it.

    Parameters
    ----------
    ledger : Ledger
        What devices can hold.
    usable : collection of str
        Devices that may hold layers while others are moved.
    closing : collection of str
        Devices that may hold the first and the last stage both; at either end of an order, they are at both.
    """

    def __init__(self, ledger: Ledger, usable: Collection[str], closing: Collection[str]) -> None:
        self._ledger = ledger
        self._usable = usable
        self._closing = closing

    def relocations(self, origin: Order, target: Order) -> list[Relocation] | None:
        """Find devices to relocate, few, until the target's order is part of the order: A* over orders.

        Parameters
        ----------
        origin, target : tuple of str
            Devices of the stages of two plans.

        Returns
        -------
        list of Relocation or None
            One after the other; ``None`` if no way was found.
        """
        start = self.all_in_order(origin, target)
        counter = itertools.count()
        came_from: dict[Order, tuple[Order, Relocation] | None] = {start: None}
        depth = {start: 0}
        heap = [(_misplaced(start, target), _misplaced(start, target), next(counter), start)]
        for _ in range(MAX_ORDERS):
            if not heap:
                return None
            order = heapq.heappop(heap)[-1]
            if not _misplaced(order, target):
                path: list[Relocation] = []
                while (step := came_from[order]) is not None:
                    order = step[0]
                    path.append(step[1])
                return path[::-1]
            for relocation in self._from(order):
                following = relocation.order
                if following not in depth or depth[order] + 1 < depth[following]:
                    depth[following] = depth[order] + 1
                    came_from[following] = (order, relocation)
                    misplaced = _misplaced(following, target)
                    heapq.heappush(heap, (depth[following] + misplaced, misplaced, next(counter), following))
        return None

    def all_in_order(self, origin: Order, target: Order) -> Order:
        """Return a plan's order with the devices inserted that hold nothing: the target's after those they follow there."""
        order = list(origin)
        for index, device in enumerate(target):
            if device not in order:
                order.insert(order.index(target[index - 1]) + 1 if index else int(_is_ring(origin)), device)
        idle = [device for device in self._usable if device not in order]
        return self._closed((*order[:1], *idle, *order[1:]))

    def _from(self, order: Order) -> Iterator[Relocation]:
        for device in dict.fromkeys(order):
            rest = tuple(each for each in order if each != device)
            if not rest:
                continue
            rest = self._closed(rest)
            without = tuple(each for each in rest if each in self._usable)
            if not can_hold(without, self._ledger):
                continue
            inner = int(_is_ring(rest))
            for index in range(inner, len(rest) + 1 - inner):
                yield Relocation(device, without, self._closed((*rest[:index], device, *rest[index:])))
        if _is_ring(order):  # what is at both ends leaves one of them, and its neighbour there takes the other one too
            for rest, closed in ((order[1:], (*order[1:], order[1])), (order[:-1], (order[-2], *order[:-1]))):
                without = tuple(each for each in rest if each in self._usable)
                if closed[0] in self._closing and closed[0] != order[0] and can_hold(without, self._ledger):
                    yield Relocation(order[0], without, closed)

    def _closed(self, order: Order) -> Order:
        if not _is_ring(order):
            if order[0] in self._closing:
                return (*order, order[0])
            if order[-1] in self._closing:
                return (order[-1], *order)
        return order


def _is_ring(order: Order) -> bool:
    return len(order) > 1 and order[0] == order[-1]


def _misplaced(order: Order, target: Order) -> int:
    """Return how many of the target's stages are not in its order: all but the longest common subsequence."""
    tails: list[int] = []  # the least place in the target at which a common subsequence of that length ends
    for device in order:
        for place in range(len(target) - 1, -1, -1):
            if target[place] == device:
                length = bisect.bisect_left(tails, place)
                tails[length : length + 1] = [place]
    return len(target) - len(tails)

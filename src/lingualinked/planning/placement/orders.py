"""The cheapest placement along a given order of devices, rings included.

Knows networks; not how orders are found, and no linear programme.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from lingualinked.planning.placement.costs import Costs
from lingualinked.planning.placement.network import Network, Ring
from lingualinked.planning.placement.problem import Placement


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """A placement, what it costs, and in which order its search went through the devices."""

    value: float
    placement: Placement

    @property
    def order(self) -> tuple[int, ...]:
        """The devices in use, each once."""
        return tuple(dict.fromkeys(span.device for span in self.placement))


def best_along(costs: Costs, order: Sequence[int]) -> Route | None:
    """Find the cheapest placement whose devices keep an order; any of them may be skipped.

    Parameters
    ----------
    costs : Costs
        Of the objective.
    order : sequence of int
        Devices, each once. The device of a ring comes before the others that the ring uses.

    Returns
    -------
    Route or None
        None if the order allows no placement.
    """
    found, best = None, math.inf
    plain = Network.of(costs, order)
    value = plain.best()
    if value < best:
        found, best = plain, value
    for network, value in rings_within(costs, order, best):
        if value < best:
            found, best = network, value
    return None if found is None else Route(best, found.shortest())


def rings_within(costs: Costs, order: Sequence[int], limit: float) -> Iterator[tuple[Network, float]]:
    """Go through the rings along an order that may cost at most a limit.

    The halves of a ring share one device's memory and time, so each first half has a network of its own. A network that
    lets every first half have its cheapest second half bounds them all from below, and spares most of them.

    Parameters
    ----------
    costs : Costs
        Of the objective.
    order : sequence of int
        Devices.
    limit : float
        Rings whose bound is above it are left out.

    Yields
    ------
    tuple of Network and float
        A ring's network and the length of its shortest path, cheapest bounds of a device first.
    """
    for device in costs.closers:
        if device not in order:
            continue
        between = order[order.index(device) + 1 :]
        if not between:
            continue
        relaxed = Network.relaxed_ring(costs, between, device)
        bounds = costs.combine(relaxed.source, relaxed.to_sink()[0]).min(axis=0)
        for end in _ascending(bounds):
            if bounds[end] > limit:
                break
            network = Network.of(costs, between, Ring(device, end))
            value = network.best()
            yield network, value
            limit = min(limit, value)


def _ascending(bounds: Iterable[float]) -> list[int]:
    """Give the indices of the finite bounds, smallest bound first."""
    return [index for _, index in sorted((bound, index) for index, bound in enumerate(bounds) if bound < math.inf)]

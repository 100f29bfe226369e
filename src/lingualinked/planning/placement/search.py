"""Orders of many devices: found by beam search and local improvement, not proven best.

Knows costs and the searches along one order; no linear programme.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lingualinked.planning.placement.beam import find_order
from lingualinked.planning.placement.bound import bottleneck_bound, progress_of
from lingualinked.planning.placement.costs import Costs
from lingualinked.planning.placement.orders import Route, best_along
from lingualinked.planning.placement.prices import priced_order, prices_of
from lingualinked.planning.placement.problem import Floats
from lingualinked.planning.placement.windows import Windows, thresholds

WIDTH = 2000
"""States that the beam keeps after each device."""

CLOSE = 1e-3
"""Relative distance from the bound at which the beam is not widened."""

MAX_WIDENED = 20
"""Devices up to which a wider beam takes no more than a few seconds."""

MAX_DEVICES = 64
"""That the beam searches over: a state's devices are the bits of one word."""

PRICED_WIDTH = 2000
"""States that the beam guided by prices keeps."""

MAX_MOVES = 600
"""Orders that local improvement tries."""


def search_bottleneck(costs: Costs, devices: Sequence[int]) -> tuple[Route | None, float]:
    """Search the order whose dearest part is cheapest.

    Parameters
    ----------
    costs : Costs
        Combined by the maximum.
    devices : sequence of int
        Those that may be used.

    Returns
    -------
    tuple of Route or None, and float
        The best that was found, and a proven lower bound on all there are.
    """
    found = min(
        filter(None, (best_along(costs, order) for order in _sorted_orders(costs, devices))), key=_value, default=None
    )
    progress = progress_of(costs, devices)
    bound = bottleneck_bound(costs, devices, _value(found))

    for width in (WIDTH, 8 * WIDTH) if len(devices) <= MAX_WIDENED else (WIDTH,):
        if _value(found) > bound * (1 + CLOSE):
            found = _bisect(costs, devices, progress, bound, found, width)
    return found, bound


def _bisect(
    costs: Costs, devices: Sequence[int], progress: Floats, bound: float, found: Route | None, width: int
) -> Route | None:
    """Search the least threshold at which the beam finds an order, near the bound first."""

    def attempt(threshold: float, *, thorough: bool = False) -> Route | None:
        windows = Windows.within(costs, devices, threshold)
        if len(devices) > MAX_DEVICES:
            strongest = np.argsort(-windows.gains(progress), kind="stable")[:MAX_DEVICES]
            windows = Windows.within(costs, [devices[index] for index in sorted(strongest)], threshold)
        order = find_order(windows, progress, width, thorough=thorough)
        return None if order is None else best_along(costs, order)

    values = thresholds(costs, devices, bound * (1 - 1e-12), _value(found) * (1 - 1e-12))
    low, high, step = 0, len(values), 1
    while low < high:
        probe = min(low + step - 1, (low + high) // 2) if high < len(values) else min(low + step - 1, high - 1)
        route = attempt(float(values[probe]))
        if route is None:
            low, step = probe + 1, step * 4
            continue
        high = probe
        if found is None or route.value < found.value:
            found = route
            high = min(probe, int(np.searchsorted(values, route.value * (1 - 1e-12))))
    if found is None and len(values):
        found = attempt(float(values[-1]), thorough=True)
    return found


def search_sum(costs: Costs, devices: Sequence[int], start: Route | None = None) -> tuple[Route | None, float]:
    """Search the order whose parts cost least together.

    Starts from a few sorted orders, a given one, and a beam search guided by prices; then devices are inserted, moved
    and swapped while that helps. Any device of an order may be skipped, so that an insertion replaces others as well.

    Parameters
    ----------
    costs : Costs
        Combined by addition.
    devices : sequence of int
        Those that may be used.
    start : Route, optional
        Some placement, to start from.

    Returns
    -------
    tuple of Route or None, and float
        The best that was found, and a proven lower bound on all there are; 0 if there are too many windows for one.
    """
    routes = [best_along(costs, order) for order in _sorted_orders(costs, devices)]
    if start is not None:
        routes.append(best_along(costs, start.order))
    found = min(filter(None, routes), key=_value, default=None)
    prices = prices_of(costs, devices)
    if prices is not None and len(devices) <= MAX_DEVICES and prices.bound < _value(found):
        order = priced_order(costs, devices, prices, _value(found), PRICED_WIDTH)
        found = found if order is None else best_along(costs, order)
    return _improved(costs, devices, found), 0.0 if prices is None else prices.bound


def _improved(costs: Costs, devices: Sequence[int], found: Route | None) -> Route | None:
    moves_left, improved = MAX_MOVES, found is not None
    while improved and found is not None:
        improved = False
        for order in _neighbours(found.order, devices):
            moves_left -= 1
            if moves_left < 0:
                return found
            route = best_along(costs, order)
            if route is not None and route.value < found.value * (1 - 1e-12):
                found, improved = route, True
                break
    return found


def _value(route: Route | None) -> float:
    return math.inf if route is None else route.value


def _sorted_orders(costs: Costs, devices: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Give the devices as they come, and by cost, with those in front and at the end that may be there."""
    yield tuple(devices)
    layers = np.arange(costs.num_layers)
    single = costs.span[:, layers, layers + 1]
    mean = np.where(np.isfinite(single), single, np.nan)
    price = {d: float(np.nanmean(mean[d])) if np.isfinite(single[d]).any() else math.inf for d in devices}
    held = {d: int((np.isfinite(costs.span[d])).sum(axis=1).max()) for d in devices}
    for key in (lambda d: price[d], lambda d: -price[d], lambda d: price[d] / max(held[d], 1), lambda d: -held[d]):
        order = sorted(devices, key=key)
        yield tuple(order)
        firsts = [d for d in order if np.isfinite(costs.span[d, 0]).any() and costs.enter[d] < math.inf]
        lasts = [d for d in order if np.isfinite(costs.span[d, :, -1]).any() and costs.leave[d] < math.inf]
        if firsts and lasts:
            last = next((d for d in lasts if d != firsts[0]), lasts[0])
            inner = [d for d in order if d not in (firsts[0], last)]
            yield tuple(dict.fromkeys([firsts[0], *inner, last]))


def _neighbours(order: tuple[int, ...], devices: Sequence[int]) -> Iterator[tuple[int, ...]]:
    used = set(order)
    for device in devices:
        rest = tuple(d for d in order if d != device)
        for position in range(len(rest) + 1):
            moved = (*rest[:position], device, *rest[position:])
            if device not in used or moved != order:
                yield moved
    for here in range(len(order)):
        for there in range(here + 1, len(order)):
            swapped = list(order)
            swapped[here], swapped[there] = swapped[there], swapped[here]
            yield tuple(swapped)

"""The plan along one order of devices that is easiest to reach, and to leave again.

Knows one order and what devices hold meanwhile; not which order to try.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lingualinked.planning.passage.holdings import Ledger, Spans
from lingualinked.planning.placement.problem import Flags, Floats

EXCESS = 1e4
"""What a byte beyond a device's limit costs, in bytes that have to be sent."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """Many sets of layers that a device could hold: their bounds, whether the ends are among them, and their stages."""

    starts: tuple[Floats, ...]
    ends: tuple[Floats, ...]
    has_first: Flags
    has_last: Flags
    num_stages: Floats


def can_hold(order: Sequence[str], ledger: Ledger) -> bool:
    """Whether devices in an order, each with a stage or none, can hold the model; the first may be the last again."""
    if not order:
        return False
    is_ring = len(order) > 1 and order[0] == order[-1]
    if not is_ring:
        return _reach(order, 0, ledger) == ledger.num_layers
    closing, middle = order[0], order[1:-1]
    for start in range(ledger.furthest(closing, 0) + 1):
        end = _reach(middle, start, ledger)
        ends = [(closing, 0, start)] * (start > 0) + [(closing, end, ledger.num_layers)] * (end < ledger.num_layers)
        if ledger.held_bytes(closing, tuple(ends)) <= ledger.limits[closing]:
            return True
    return False


def closest_fill(order: Sequence[str], ledger: Ledger, origin: Spans, target: Spans) -> Spans | None:
    """Find the plan along an order that passes memory least beside two others, and then moves least from the first.

    A dynamic programme over (devices, layers placed); with the first device again as the last one, over where its first
    stage ends besides.

    Parameters
    ----------
    order : sequence of str
        Devices; each holds a stage or none.
    ledger : Ledger
        What devices can hold.
    origin, target : tuple of (str, int, int)
        The plan that it is reached from, and the one that is reached from it.

    Returns
    -------
    Spans or None
        A plan that fits by itself; ``None`` if there is none.
    """
    num_layers, is_ring = ledger.num_layers, len(order) > 1 and order[0] == order[-1]
    layers = np.arange(num_layers + 1, dtype=float)
    best = np.full(
        (num_layers + 1 if is_ring else 1, num_layers + 1), np.inf
    )  # [end of the first stage, layers placed]
    best[np.arange(len(best)), np.arange(len(best))] = 0.0
    choices = []
    for device in order[1:-1] if is_ring else order:
        costs = _costs(device, _single(layers), ledger, origin, target)
        costs[np.tril_indices(num_layers + 1)] = np.inf
        sums = best[:, :, None] + costs
        start = sums.argmin(axis=1)
        with_device = np.take_along_axis(sums, start[:, None, :], axis=1)[:, 0, :]
        choices.append((device, np.where(with_device < best, start, -1)))
        best = np.minimum(best, with_device)
    if is_ring:
        closing = _costs(order[0], _both_ends(layers), ledger, origin, target)
        closing[np.tril_indices(num_layers + 1, -1)] = np.inf
        best = best + closing
        row, end = map(int, np.unravel_index(best.argmin(), best.shape))
    else:
        row, end = 0, num_layers
    if not np.isfinite(best[row, end]):
        return None
    return _trace_back(order, choices, row, end, num_layers)


def _trace_back(
    order: Sequence[str], choices: Sequence[tuple[str, Floats]], row: int, end: int, num_layers: int
) -> Spans:
    spans = [(order[-1], end, num_layers)] if end < num_layers else []
    for device, starts in reversed(choices):
        start = int(starts[row, end])
        if start >= 0:
            spans.append((device, start, end))
            end = start
    if end > 0:  # what the first device holds of a ring
        if spans and spans[-1][0] == order[0]:
            return ((order[0], 0, num_layers),)
        spans.append((order[0], 0, end))
    return tuple(reversed(spans))


def _reach(order: Sequence[str], start: int, ledger: Ledger) -> int:
    for device in order:
        if start < ledger.num_layers:
            start = ledger.furthest(device, start)
    return start


def _single(layers: Floats) -> _Parts:
    """Every span ``[s, e)``, at ``[s, e]``."""
    starts, ends = layers[:, None], layers[None, :]
    shape = np.broadcast_shapes(starts.shape, ends.shape)
    return _Parts(
        (starts,),
        (ends,),
        np.broadcast_to(starts == 0, shape),
        np.broadcast_to(ends == layers[-1], shape),
        np.ones(shape),
    )


def _both_ends(layers: Floats) -> _Parts:
    """``[0, a)`` and ``[b, L)`` together, at ``[a, b]``; either may be empty."""
    a, b, last = layers[:, None], layers[None, :], layers[-1]
    shape = np.broadcast_shapes(a.shape, b.shape)
    return _Parts(
        (np.zeros_like(a), b),
        (a, np.full_like(b, last)),
        np.broadcast_to((a > 0) | (b == 0), shape),
        np.broadcast_to((b < last) | (a == last), shape),
        (a > 0).astype(float) + (b < last),
    )


def _costs(device: str, parts: _Parts, ledger: Ledger, origin: Spans, target: Spans) -> Floats:
    """Return what each set of layers costs on a device; ``inf`` where it can't hold it."""
    limit = ledger.limits[device]
    costs, sent = np.zeros(parts.has_first.shape), np.zeros(parts.has_first.shape)
    for plan in (target, origin):
        held, sent = _held_bytes(device, parts, ledger, plan)
        costs += EXCESS * np.maximum(held - limit, 0.0)
    alone, _ = _held_bytes(device, parts, ledger, ())
    refused = alone > limit
    if device not in ledger.may_hold_ends:
        first, last = ledger.for_all
        for starts, ends in zip(parts.starts, parts.ends, strict=True):
            refused |= (ends > starts) & ((starts < first) | (ends > last))
    return np.where(refused, np.inf, costs + sent)


def _held_bytes(device: str, parts: _Parts, ledger: Ledger, plan: Spans) -> tuple[Floats, Floats]:
    """Return the bytes that a device holds with each set of layers beside a plan's, and those of them that are new."""
    before = np.asarray(ledger.before, dtype=float)
    own = [(start, end) for name, start, end in plan if name == device]
    new = np.zeros(parts.has_first.shape)
    for starts, ends in zip(parts.starts, parts.ends, strict=True):
        low, high = before[starts.astype(int)], before[ends.astype(int)]
        new = new + (high - low)
        for start, end in own:
            new = new - np.maximum(np.minimum(high, before[end]) - np.maximum(low, before[start]), 0.0)
    weights = ledger.weights
    has_first = parts.has_first | any(start == 0 for start, _ in own)
    has_last = parts.has_last | any(end == ledger.num_layers for _, end in own)
    around = weights.prologue * has_first + weights.epilogue * has_last - weights.tied * (has_first & has_last)
    held = sum(before[end] - before[start] for start, end in own) + new + around
    return held + ledger.working * np.maximum(parts.num_stages, len(own)), new

"""Tables over every span of every device: seconds, missing bytes, and what spans and hops cost under an objective.

Knows one placement problem; not which placements there are, nor how the cheapest one is found.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from lingualinked.planning.placement.problem import Floats, Placement, Problem
from lingualinked.planning.placement.shortcuts import ShortcutTables, tabulate

TOLERANCE = 1e-12
"""Relative. The same sum formed in another order differs by a few times 1e-16 per term; 1e-12 forgives thousands."""

PROVEN = 1e-9
"""Relative distance of two costs, or of a value and its bound, that counts as none; see the tolerances of `programme`."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SpanTables:
    """Seconds and excess bytes of span ``[i, j)`` on device d, as a stage of its own and as half of a ring.

    Parameters
    ----------
    seconds : ndarray
        float64 ``[D, L+1, L+1]``, compute of the stage, the ends' cost included; ``inf`` where the span is empty.
    excess_bytes : ndarray
        float64 ``[D, L+1, L+1]``, bytes by which the stage exceeds the device's memory, 0 if it fits; ``inf`` where the
        span is empty or the device may not hold all of its layers.
    ring_excess_bytes : dict of int to ndarray
        For each device that may hold both ends: float64 ``[L+1, L+1]``, the same for ``[0, a)`` and ``[b, L)``
        together, at ``[a, b]``; ``inf`` where one of the two or what lies between them is empty.
    shortcuts : ShortcutTables or None
        What shortcuts cost at least, where there are any.
    """

    seconds: Floats
    excess_bytes: Floats
    ring_excess_bytes: dict[int, Floats]
    shortcuts: ShortcutTables | None = None

    @classmethod
    def of(cls, problem: Problem) -> SpanTables:
        """Tabulate a problem."""
        num_layers = problem.num_layers
        is_empty = np.tri(num_layers + 1, dtype=bool)
        seconds = _window_sums(problem.layer_s) + problem.stage_s[:, None, None]
        seconds[:, 0, :] += problem.first_s[:, None]
        seconds[:, :, -1] += problem.last_s[:, None]
        seconds[:, is_empty] = np.inf

        window_bytes = _window_sums(problem.layer_bytes[None])[0]
        num_bytes = window_bytes + problem.stage_bytes[:, None, None]
        num_bytes[:, 0, :] += problem.first_bytes
        num_bytes[:, :, -1] += problem.last_bytes
        num_bytes[:, 0, -1] -= problem.tied_bytes
        shortcuts = None
        if problem.shortcuts is not None:
            shortcuts = tabulate(problem.shortcuts, num_layers, problem.may_be_first)
        excess = _excess(num_bytes, problem.capacity_bytes[:, None, None])
        excess[~problem.may_be_first, : problem.num_front, :] = np.inf
        excess[~problem.may_be_last, :, num_layers - problem.num_back + 1 :] = np.inf
        cuts = list(problem.forbidden_cuts)
        excess[:, cuts, :] = excess[:, :, cuts] = np.inf
        if shortcuts is not None:
            excess[shortcuts.is_forbidden] = np.inf
        excess[:, is_empty] = np.inf

        both_ends = window_bytes[0][:, None] + window_bytes[:, -1][None, :]
        both_ends += problem.first_bytes + problem.last_bytes - problem.tied_bytes
        is_no_ring = is_empty.copy()
        is_no_ring[0, :] = is_no_ring[:, -1] = True
        is_no_ring[cuts, :] = is_no_ring[:, cuts] = True
        rings = {}
        for device in np.flatnonzero(problem.may_close & problem.may_be_first & problem.may_be_last).tolist():
            rings[device] = _excess(both_ends + 2 * problem.stage_bytes[device], problem.capacity_bytes[device])
            rings[device][is_no_ring] = np.inf
            if problem.shortcuts is not None:
                for made_at, makers in problem.shortcuts.makers.items():
                    if not makers[device]:  # neither half may hold what it makes
                        rings[device][made_at + 1 :, :] = rings[device][:, : made_at + 1] = np.inf
        return cls(seconds, excess, rings, shortcuts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Costs:
    """Costs of the parts of a placement; what is not allowed costs ``inf``.

    A placement costs ``enter . span . hop . span ... leave``, where ``.`` is addition (latency, energy) or the maximum
    (bottleneck, missing bytes).

    Parameters
    ----------
    span : ndarray
        float64 ``[D, L+1, L+1]``, of a stage with layers ``[i, j)``.
    hop : ndarray
        float64 ``[D, D]``; ``inf`` from a device to itself.
    enter, leave : ndarray
        float64 ``[D]``, from and to the caller.
    front : ndarray
        float64 ``[D, L+1]``, of entering a ring on a device that takes ``[0, a)``.
    close : dict of int to ndarray
        For each device that some ring could start and end on: float64 ``[L+1, L+1]``, of closing that ring with
        ``[b, L)`` and leaving it, at ``[a, b]``. If b is possible beside a, so is every later b, and b beside every
        earlier a; forbidden cuts left aside.
    may_go_on : bool
        Whether who may hold layers may also hold the later ones of them alone, at no more cost.
    """

    span: Floats
    hop: Floats
    enter: Floats
    leave: Floats
    front: Floats
    close: dict[int, Floats]
    may_go_on: bool = True

    def at_most(self, cap: float) -> Costs:
        """Return the same costs without the parts that cost more than a cap."""
        limit = cap * (1 + TOLERANCE)

        def within(cost: Floats) -> Floats:
            return np.where(cost <= limit, cost, np.inf)

        close = {device: within(table) for device, table in self.close.items()}
        names = ("span", "hop", "enter", "leave", "front")
        parts: dict[str, Any] = {name: within(getattr(self, name)) for name in names}
        return dataclasses.replace(self, close=close, **parts)

    def with_every_hop(self) -> Costs:
        """Return the same costs as if there were a link between any two devices."""
        return dataclasses.replace(self, hop=_between(np.zeros_like(self.hop)))

    def of_stages(self) -> Costs:
        """Return costs that count the stages of a placement, of what is allowed here and could not go on.

        From a device that a hop leads from to every other one, ending further is never worse: whoever holds the layers
        after an end can hold those after a later one, and who holds none of them any more is skipped.
        """
        ends = np.arange(self.span.shape[2])
        furthest = np.where(np.isfinite(self.span[:, :, :-1]), ends[:-1], -1).max(axis=2, keepdims=True)
        leads_everywhere = np.asarray((np.isfinite(self.hop) | np.eye(len(self.hop), dtype=bool)).all(axis=1))
        goes_on = leads_everywhere[:, None, None] & (ends != furthest) & (ends != ends[-1])
        goes_on &= self.may_go_on
        return Costs(
            span=_allowed(np.where(goes_on, np.inf, self.span), 1.0),
            hop=_allowed(self.hop, 0.0),
            enter=_allowed(self.enter, 0.0),
            leave=_allowed(self.leave, 0.0),
            front=_allowed(self.front, 1.0),
            close={device: _allowed(table, 1.0) for device, table in self.close.items()},
            may_go_on=self.may_go_on,
        )

    def costliest(self, placement: Placement) -> float:
        """Return what the costliest part of a placement costs."""
        first, last = placement[0], placement[-1]
        parts = [self.enter[first.device], self.leave[last.device]]
        parts += [self.hop[here.device, there.device] for here, there in itertools.pairwise(placement)]
        if len(placement) > 1 and first.device == last.device:
            parts += [self.front[first.device, first.end], self.close[first.device][first.end, last.start]]
            placement = placement[1:-1]
        return float(max(*parts, *(self.span[span.device, span.start, span.end] for span in placement)))


def bottleneck_costs(problem: Problem, tables: SpanTables) -> Costs:
    """Cost parts by the seconds in which they are busy; the largest counts."""
    enter, leave = _allowed(problem.enter_s, problem.enter_busy_s), _allowed(problem.leave_s, problem.leave_busy_s)
    seconds, close = tables.seconds, {}
    if tables.shortcuts is not None:
        seconds = np.maximum(seconds, tables.shortcuts.busiest_s)
    for device, excess in tables.ring_excess_bytes.items():
        ring_s = tables.seconds[device, 0, :, None] + tables.seconds[device, None, :, -1]
        if tables.shortcuts is not None:
            ring_s = np.maximum(ring_s, tables.shortcuts.closing_busiest_s[device][None, :])
        close[device] = np.where(excess == 0, np.maximum(ring_s, leave[device]), np.inf)
    return Costs(
        span=np.where(tables.excess_bytes == 0, seconds, np.inf),
        hop=_between(_allowed(problem.hop_s, problem.busy_s)),
        enter=enter,
        leave=leave,
        front=np.maximum(enter[:, None], tables.seconds[:, 0, :]),
        close=close,
        may_go_on=problem.shortcuts is None or not any(problem.shortcuts.makers),
    )


def sum_costs(problem: Problem, busy: Costs, tables: SpanTables, *, watts: Floats | None = None) -> Costs:
    """Cost the parts that are allowed by their seconds, or by the joules of their compute; the sum counts.

    Parameters
    ----------
    problem : Problem
        The problem.
    busy : Costs
        By busy seconds, up to the limit on the bottleneck: what is ``inf`` there is not allowed here.
    tables : SpanTables
        Of the problem.
    watts : ndarray or None
        float64 ``[D]``, to count joules, of which links cost none; ``None``: seconds.
    """
    weight = np.ones(problem.num_devices) if watts is None else watts
    links = (problem.hop_s, problem.enter_s, problem.leave_s)
    hop, enter, leave = links if watts is None else map(np.zeros_like, links)
    seconds = np.where(np.isfinite(tables.seconds), tables.seconds, 0.0) * weight[:, None, None]
    closing = seconds[:, :, -1]
    if tables.shortcuts is not None and watts is None:
        seconds, closing = seconds + tables.shortcuts.seconds, closing + tables.shortcuts.closing_s
    return Costs(
        span=_allowed(busy.span, seconds),
        hop=_allowed(busy.hop, hop),
        enter=_allowed(busy.enter, enter),
        leave=_allowed(busy.leave, leave),
        front=_allowed(busy.front, enter[:, None] + seconds[:, 0, :]),
        close={
            device: _allowed(table, (closing[device] + leave[device])[None, :]) for device, table in busy.close.items()
        },
        may_go_on=busy.may_go_on,
    )


def excess_costs(problem: Problem, tables: SpanTables) -> Costs:
    """Cost parts by the bytes that their device lacks; the largest counts."""
    nothing = np.zeros(problem.num_devices)
    return Costs(
        span=tables.excess_bytes,
        hop=_between(np.zeros_like(problem.hop_s)),
        enter=nothing,
        leave=nothing,
        front=np.zeros(tables.seconds.shape[:2]),
        close=tables.ring_excess_bytes,
        may_go_on=problem.shortcuts is None or not any(problem.shortcuts.makers),
    )


def _allowed(like: Floats, cost: Floats | float) -> Floats:
    return np.where(np.isfinite(like), cost, np.inf)


def _window_sums(values: Floats) -> Floats:
    """Sum each half-open window, ``[D, L]`` to ``[D, L+1, L+1]``; 0 where ``i >= j``.

    Summed up from each start: differences of sums from the first would lose small layers behind large ones.
    """
    num_layers = values.shape[1]
    sums = np.zeros((values.shape[0], num_layers + 1, num_layers + 1))
    from_start = np.where(np.tri(num_layers, dtype=bool).T, values[:, None, :], 0.0)
    np.cumsum(from_start, axis=2, out=sums[:, :-1, 1:])
    return sums


def _excess(num_bytes: Floats, capacity_bytes: Floats | float) -> Floats:
    """Subtract what a device has from what it would hold; bytes are whole, so that no tolerance is needed."""
    return np.maximum(num_bytes - capacity_bytes, 0.0)


def _between(cost: Floats) -> Floats:
    cost = cost.copy()
    np.fill_diagonal(cost, np.inf)
    return cost

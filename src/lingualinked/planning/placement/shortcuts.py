"""Tensors that skip stages, in a placement problem: who makes them, who uses them, and what sending or holding costs.

Knows arrays of seconds and bytes; not what the tensors are, nor which placement is best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShortcutCosts:
    """What one shortcut costs.

    Parameters
    ----------
    made_at : int
        The layer whose stage makes it.
    used_at : tuple of int
        The layers that use it; L stands for what runs after the last one.
    send_s : ndarray
        float64 ``[D, D]``, seconds of a mean step in which the link from its maker to a stage that uses it carries it.
    shows_text : bool
        Whether it is the token ids, or made of them before the layers, which only devices may use that may be first.
    """

    made_at: int
    used_at: tuple[int, ...]
    send_s: Floats
    shows_text: bool = False

    def is_sent_to(self, start: int, end: int, num_layers: int) -> bool:
        """Return whether a stage of layers ``[start, end)`` uses it, and another one makes it."""
        return self.made_at < start and any(start <= at < end or at == end == num_layers for at in self.used_at)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shortcuts:
    """All shortcuts of a problem, and which devices may hold the layers that make them.

    A stage that uses a shortcut which another stage makes gets it once a step, over the link from the maker's device.

    Parameters
    ----------
    costs : tuple of ShortcutCosts
        At least one.
    makers : dict of int to ndarray
        For each layer at which something is made: bool ``[D]``, which devices may hold it.
    """

    costs: tuple[ShortcutCosts, ...]
    makers: dict[int, Flags]

    def seconds(self, made_at: int, maker: int, user: int, span: tuple[int, int], num_layers: int) -> float:
        """Return the seconds in which the link between two devices carries what is made at a layer and used in a span."""
        if maker == user:
            return 0.0
        sent = (each for each in self.costs if each.made_at == made_at and each.is_sent_to(*span, num_layers))
        return sum(float(each.send_s[maker, user]) for each in sent)

    def only(self, made_at: int, devices: Flags) -> Shortcuts:
        """Return the same with the devices that may hold a maker restricted to some."""
        return dataclasses.replace(self, makers={**self.makers, made_at: self.makers[made_at] & devices})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ShortcutTables:
    """What shortcuts cost each span ``[i, j)`` on device d at least, whichever device makes them.

    Parameters
    ----------
    seconds : ndarray
        float64 ``[D, L+1, L+1]``, of all links together.
    busiest_s : ndarray
        float64 ``[D, L+1, L+1]``, of the busiest link.
    closing_s, closing_busiest_s : ndarray
        float64 ``[D, L+1]``, the same of the second half ``[b, L)`` of a ring, whose first half makes what is made in it.
    is_forbidden : ndarray
        bool ``[D, L+1, L+1]``, spans that use ids or make something where they may not.
    """

    seconds: Floats
    busiest_s: Floats
    closing_s: Floats
    closing_busiest_s: Floats
    is_forbidden: Flags


def tabulate(shortcuts: Shortcuts, num_layers: int, may_see_ids: Flags) -> ShortcutTables:
    """Tabulate shortcuts over all spans; ``may_see_ids`` is a bool ``[D]``."""
    num_devices, size = len(may_see_ids), num_layers + 1
    starts, ends = np.arange(size)[:, None], np.arange(size)[None, :]

    def holds(layer: int) -> Flags:
        held: Flags = (starts <= layer) & ((layer < ends) | ((layer == num_layers) & (ends == num_layers)))
        return held

    # 1) where each shortcut is used, and another stage makes it
    used = [
        (starts > each.made_at) & np.logical_or.reduce([holds(layer) for layer in each.used_at])
        for each in shortcuts.costs
    ]
    tables = ShortcutTables(
        seconds=np.zeros((num_devices, size, size)),
        busiest_s=np.zeros((num_devices, size, size)),
        closing_s=np.zeros((num_devices, size)),
        closing_busiest_s=np.zeros((num_devices, size)),
        is_forbidden=np.zeros((num_devices, size, size), dtype=bool),
    )
    for mask, each in zip(used, shortcuts.costs, strict=True):
        if each.shows_text:
            tables.is_forbidden[~may_see_ids] |= mask
    # 2) seconds, from whichever device may make them and is nearest
    for made_at, makers in shortcuts.makers.items():
        tables.is_forbidden[~makers] |= (starts <= made_at) & (made_at < ends)
        made = [(mask, each) for mask, each in zip(used, shortcuts.costs, strict=True) if each.made_at == made_at]
        is_used = np.logical_or.reduce([mask for mask, _ in made])
        for device in range(num_devices):
            nearest = np.where(is_used, np.inf, 0.0)
            for maker in np.flatnonzero(makers).tolist():
                if maker != device:
                    nearest = np.minimum(nearest, sum(each.send_s[maker, device] * mask for mask, each in made))
            tables.is_forbidden[device] |= np.isinf(nearest)
            nearest[np.isinf(nearest)] = 0.0
            tables.seconds[device] += nearest
            np.maximum(tables.busiest_s[device], nearest, out=tables.busiest_s[device])
            if made_at and not makers[device]:  # else the ring's own first half may be the maker
                tables.closing_s[device] += nearest[:, -1]
                np.maximum(tables.closing_busiest_s[device], nearest[:, -1], out=tables.closing_busiest_s[device])
    return tables


def maker_of(spans: Sequence[tuple[int, int, int]], layer: int) -> int:
    """Return the device of the stage that holds a layer."""
    return next(device for device, start, end in spans if start <= layer < end)


def sendings(shortcuts: Shortcuts, spans: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, float]]:
    """List what is sent in a placement, given by device, start and end: from which device to which, and for how many seconds."""
    num_layers = spans[-1][2]
    for user, start, end in spans:
        for made_at in shortcuts.makers:
            maker = maker_of(spans, made_at)
            seconds = shortcuts.seconds(made_at, maker, user, (start, end), num_layers)
            if seconds:
                yield maker, user, seconds

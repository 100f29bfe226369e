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
class RelayCosts:
    """What one relay costs.

    Parameters
    ----------
    name : str
        Of the relay.
    made_at : int
        The layer whose stage makes it.
    used_at : tuple of int
        The layers that use it; L stands for what runs after the last one.
    send_s : ndarray
        float64 ``[D, D]``, seconds of a mean step in which the link from its maker to a stage that uses it carries it.
    held_bytes : float
        Weight bytes of the part that makes it, where stages that use it hold the part if they can; 0: it is always sent.
    is_ids : bool
        Whether it is the token ids, which only devices may use that may be first.
    """

    name: str
    made_at: int
    used_at: tuple[int, ...]
    send_s: Floats
    held_bytes: float = 0.0
    is_ids: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageRelays:
    """What one stage gets beside hidden states: relays that are sent to it, parts that it holds, and whether ids come for these."""

    sent: tuple[int, ...]
    held: tuple[int, ...]
    needs_ids: bool

    def seconds_from(self, maker: int, user: int, made_at: int, relays: Relays) -> float:
        """Return the seconds in which the link from the device that holds layer ``made_at`` carries what is made there."""
        if maker == user:
            return 0.0
        seconds = sum(
            float(relays.costs[index].send_s[maker, user])
            for index in self.sent
            if relays.costs[index].made_at == made_at
        )
        return seconds + float(relays.ids_s[maker, user]) * (self.needs_ids and made_at == 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relays:
    """All relays of a problem, and which devices may hold the layers that make them.

    A stage that uses a relay which another stage makes gets it once a step, over the link from the maker's device. Where a part is to
    be held instead and fits into the memory that the stage leaves, it gets token ids: then the device must be one that may see them.

    Parameters
    ----------
    costs : tuple of RelayCosts
        At least one.
    ids_s : ndarray
        float64 ``[D, D]``, seconds in which a link carries the token ids of a mean step.
    makers : dict of int to ndarray
        For each layer at which something is made: bool ``[D]``, which devices may hold it.
    """

    costs: tuple[RelayCosts, ...]
    ids_s: Floats
    makers: dict[int, Flags]

    def of_stage(self, start: int, end: int, num_layers: int, room: float, may_hold: bool) -> StageRelays:
        """Return what a stage of layers ``[start, end)`` gets that has so many bytes of room and, maybe, may see token ids."""
        used = [
            index
            for index, each in enumerate(self.costs)
            if each.made_at < start and any(start <= at < end or at == end == num_layers for at in each.used_at)
        ]
        held = []
        for index in self.by_size(used):
            num_bytes = self.costs[index].held_bytes
            if num_bytes and may_hold and num_bytes <= room:
                held.append(index)
                room -= num_bytes
        has_ids = any(self.costs[index].is_ids for index in used)
        return StageRelays(
            sent=tuple(index for index in used if index not in held),
            held=tuple(sorted(held)),
            needs_ids=bool(held) and not has_ids,
        )

    def by_size(self, indices: Sequence[int]) -> list[int]:
        """Sort relays by the bytes that holding them takes, in which order they are held while there is room."""
        return sorted(indices, key=lambda index: (self.costs[index].held_bytes, index))

    def only(self, made_at: int, devices: Flags) -> Relays:
        """Return the same with the devices that may hold a maker restricted to some."""
        return dataclasses.replace(self, makers={**self.makers, made_at: self.makers[made_at] & devices})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RelayTables:
    """What relays cost each span ``[i, j)`` on device d at least, whichever device makes them.

    Parameters
    ----------
    seconds : ndarray
        float64 ``[D, L+1, L+1]``, of all links together.
    busiest_s : ndarray
        float64 ``[D, L+1, L+1]``, of the busiest link.
    closing_s, closing_busiest_s : ndarray
        float64 ``[D, L+1]``, the same of the second half ``[b, L)`` of a ring, whose first half makes what is made in it.
    held_bytes : ndarray
        float64 ``[D, L+1, L+1]``, parts that the stage holds.
    is_forbidden : ndarray
        bool ``[D, L+1, L+1]``, spans that use ids or make something where they may not.
    """

    seconds: Floats
    busiest_s: Floats
    closing_s: Floats
    closing_busiest_s: Floats
    held_bytes: Floats
    is_forbidden: Flags


def tabulate(relays: Relays, room: Floats, may_see_ids: Flags) -> RelayTables:
    """Tabulate relays over all spans.

    Parameters
    ----------
    relays : Relays
        The relays.
    room : ndarray
        float64 ``[D, L+1, L+1]``, bytes that are left of each device's memory beside the stage.
    may_see_ids : ndarray
        bool ``[D]``.
    """
    num_devices, size = room.shape[:2]
    num_layers = size - 1
    starts, ends = np.arange(size)[:, None], np.arange(size)[None, :]

    def holds(layer: int) -> Flags:
        held: Flags = (starts <= layer) & ((layer < ends) | ((layer == num_layers) & (ends == num_layers)))
        return held

    # 1) where each relay is used, and where its part is held instead
    used = [
        (starts > each.made_at) & np.logical_or.reduce([holds(layer) for layer in each.used_at])
        for each in relays.costs
    ]
    held_bytes = np.zeros_like(room)
    held = [np.zeros(room.shape, dtype=bool) for _ in relays.costs]
    for index in relays.by_size(range(len(used))):
        num_bytes = relays.costs[index].held_bytes
        if num_bytes:
            held[index] = used[index] & may_see_ids[:, None, None] & (held_bytes + num_bytes <= room)
            held_bytes += num_bytes * held[index]
    has_ids = np.logical_or.reduce(
        [mask for mask, each in zip(used, relays.costs, strict=True) if each.is_ids] or [used[0] & False]
    )
    needs_ids = np.logical_or.reduce(held) & ~has_ids
    # 2) seconds, from whichever device may make them and is nearest
    tables = RelayTables(
        seconds=np.zeros_like(room),
        busiest_s=np.zeros_like(room),
        closing_s=np.zeros(room.shape[:2]),
        closing_busiest_s=np.zeros(room.shape[:2]),
        held_bytes=held_bytes,
        is_forbidden=has_ids & ~may_see_ids[:, None, None],
    )
    for made_at, makers in relays.makers.items():
        tables.is_forbidden[~makers] |= (starts <= made_at) & (made_at < ends)
        for device in range(num_devices):
            nearest = np.full(room.shape[1:], np.inf)
            for maker in np.flatnonzero(makers).tolist():
                if maker != device:
                    seconds = relays.ids_s[maker, device] * needs_ids[device] * (made_at == 0)
                    for index, each in enumerate(relays.costs):
                        if each.made_at == made_at:
                            seconds = seconds + each.send_s[maker, device] * (used[index] & ~held[index][device])
                    nearest = np.minimum(nearest, seconds)
            is_used = np.logical_or.reduce(
                [mask for mask, each in zip(used, relays.costs, strict=True) if each.made_at == made_at]
            )
            nearest = np.where(is_used, nearest, 0.0)
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


def sendings(
    relays: Relays, spans: Sequence[tuple[int, int, int]], stages: Sequence[StageRelays]
) -> Iterator[tuple[int, int, int, float]]:
    """List what is sent in a placement: the layer at which it is made, from which device to which, and for how many seconds."""
    for (user, _, _), stage in zip(spans, stages, strict=True):
        for made_at in relays.makers:
            maker = maker_of(spans, made_at)
            seconds = stage.seconds_from(maker, user, made_at, relays)
            if seconds:
                yield made_at, maker, user, seconds

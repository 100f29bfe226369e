"""From one plan to another along one order of devices: in every step all layers move that their new devices have room for.

Knows slots, places in that order; nothing moves but from a layer's old device to its new one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from lingualinked.planning.passage.holdings import Ledger, Spans

Places = tuple[int, ...]


class Track:
    """An order of slots that two plans share, and where each block of layers lies on it that must stay together.

    A device has one slot, or two where the plans hold it in different places; both at once only as the first and the last.
    """

    def __init__(self, origin: Spans, target: Spans, ledger: Ledger) -> None:
        self.ledger = ledger
        first, second = slots_of(origin), slots_of(target)
        self.slots, first_slots, second_slots = merged(first, second)
        self._bounds = ledger.bounds
        self.begin = _places(origin, first_slots, self._bounds)
        self.goal = _places(target, second_slots, self._bounds)
        self._slots_of: dict[str, list[int]] = {}
        for index, device in enumerate(self.slots):
            self._slots_of.setdefault(device, []).append(index)
        self._twins = [slots for slots in self._slots_of.values() if len(slots) > 1]

    def spans(self, places: Sequence[int]) -> Spans:
        """Return the plan in which the blocks lie there."""
        spans: list[tuple[str, int, int]] = []
        for slot, run in itertools.groupby(range(len(places)), key=places.__getitem__):
            blocks, device = list(run), self.slots[slot]
            start = spans.pop()[1] if spans and spans[-1][0] == device else self._bounds[blocks[0]]
            spans.append((device, start, self._bounds[blocks[-1] + 1]))
        return tuple(spans)

    def may_enter(self, held: Spans, places: Sequence[int], slot: int) -> bool:
        """Whether a plan is valid, and its part in one slot's device fits beside what is held there."""
        for twins in self._twins:
            taken = [each for each in twins if self._span(places, each)]
            if len(taken) > 1 and (len(taken) > 2 or places[0] != taken[0] or places[-1] != taken[1]):
                return False
        device = self.slots[slot]
        gained = tuple(filter(None, (self._span(places, each) for each in self._slots_of[device])))
        kept = tuple(span for span in held if span[0] == device)
        return self.ledger.held_bytes(device, kept, gained) <= self.ledger.limits[device]

    def _span(self, places: Sequence[int], slot: int) -> tuple[str, int, int] | None:
        start = bisect.bisect_left(places, slot)
        end = bisect.bisect_right(places, slot, start)
        return (self.slots[slot], self._bounds[start], self._bounds[end]) if end > start else None


def waves(origin: Spans, target: Spans, ledger: Ledger) -> list[Spans] | None:
    """Move every layer straight to its new device, in each step as many as there is room for.

    Where each device has one slot this never gets stuck if both plans fit: of the layers that still have to move on to a
    later slot, take the last one. Whatever lies in its new slot has come to stay, for a layer there that had to leave
    could only move on, and is a later one; so the new device can hold it, as it can hold the whole of its new stage.
    Likewise with those that move back. The number of steps is at most that of the devices in a row that each have to
    wait for room on the next. A device with two slots shares its memory between them, which can close a circle of
    devices that all wait.
    """
    track = Track(origin, target, ledger)
    places, held, steps = track.begin, origin, []
    while not ledger.fit(held, target):
        following = _wave(track, held, places)
        if following == places:
            return None
        places, held = following, track.spans(following)
        steps.append(held)
    return [*steps, target]


def merged(first: Sequence[str], second: Sequence[str]) -> tuple[list[str], list[int], list[int]]:
    """Merge two orders along their longest common subsequence; return the slots, and which ones each order has."""
    longest = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in itertools.product(reversed(range(len(first))), reversed(range(len(second)))):
        common = longest[i + 1][j + 1] + 1 if first[i] == second[j] else 0
        longest[i][j] = max(common, longest[i + 1][j], longest[i][j + 1])
    slots: list[str] = []
    first_slots: list[int] = []
    second_slots: list[int] = []
    i = j = 0
    while i < len(first) or j < len(second):
        both = i < len(first) and j < len(second) and first[i] == second[j]
        from_first = both or (j == len(second) or (i < len(first) and longest[i + 1][j] >= longest[i][j + 1]))
        if from_first:
            first_slots.append(len(slots))
        if both or not from_first:
            second_slots.append(len(slots))
        slots.append(first[i] if from_first else second[j])
        i, j = i + from_first, j + (both or not from_first)
    return slots, first_slots, second_slots


def slots_of(plan: Spans) -> tuple[str, ...]:
    """Return the devices of a plan's stages, in pipeline order."""
    return tuple(device for device, _, _ in plan)


def _places(plan: Spans, slots: Sequence[int], bounds: Sequence[int]) -> Places:
    places = [slot for slot, (_, start, end) in zip(slots, plan, strict=True) for _ in range(start, end)]
    return tuple(places[first] for first in bounds[:-1])


def _wave(track: Track, held: Spans, places: Places) -> Places:
    """Move every block whose new device has room for it beside all that it holds."""
    moved, goal = list(places), track.goal
    last = len(places) - 1
    onwards = (block for block in range(last, -1, -1) if goal[block] > places[block])
    back = (block for block in range(last + 1) if goal[block] < places[block])
    for block in (*onwards, *back):
        is_free = (
            block == last or moved[block + 1] >= goal[block]
            if goal[block] > places[block]
            else block == 0 or moved[block - 1] <= goal[block]
        )
        if is_free:
            moved[block] = goal[block]
            if not track.may_enter(held, moved, goal[block]):
                moved[block] = places[block]
    return tuple(moved)

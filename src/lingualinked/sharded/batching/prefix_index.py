"""Finds the slot whose tokens begin like those of a request.

Knows token ids alone; not whether a slot may be copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_MAX_COMPARED = 8  # slots that begin alike; the newest come first


class PrefixIndex:
    """Slots by their first tokens."""

    def __init__(self, min_shared: int) -> None:
        self._min_shared = min_shared
        self._texts: dict[int, Sequence[int]] = {}
        self._slots: dict[tuple[int, ...], list[int]] = {}

    def add(self, slot: int, ids: Sequence[int]) -> None:
        """Add a slot, whose tokens may grow in place, or replace them."""
        if len(ids) > self._min_shared:
            if slot not in self._texts:
                self._slots.setdefault(self._key(ids), []).append(slot)
            self._texts[slot] = ids

    def discard(self, slot: int) -> None:
        """Forget a slot."""
        ids = self._texts.pop(slot, None)
        if ids is not None:
            slots = self._slots[self._key(ids)]
            slots.remove(slot)
            if not slots:
                del self._slots[self._key(ids)]

    def find(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield slots that begin like a text and how many tokens they share, at most all but its last; longest first."""
        if len(ids) <= self._min_shared:
            return
        slots = self._slots.get(self._key(ids), ())[-_MAX_COMPARED:]
        found = [(_num_common(ids, self._texts[slot]), slot) for slot in slots]
        for num_common, slot in sorted(found, reverse=True):
            yield slot, min(num_common, len(ids) - 1)

    def _key(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids[: self._min_shared])


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)

"""Decides which tokens of which requests run next in a continuous batch: events in, instructions out.

Knows requests, microbatches and room for KV; neither threads, nor workers, nor how tokens are chosen.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping

from lingualinked.sharded.batching.events import (
    Admitted,
    Copy,
    Failed,
    Instruction,
    Limits,
    Outcome,
    Part,
    Request,
    Rooms,
    Run,
)
from lingualinked.sharded.batching.prefix_index import PrefixIndex

_MAX_OVERTAKEN = 64  # later requests that may be admitted before one of lower priority
_GRANULE_TOKENS = 64  # by which a request without a limit of its own reserves room


class Scheduler:
    """The requests of one manager.

    A microbatch holds the next token of as many requests as make all microbatches in flight equal, and chunks of prompts. A
    request is admitted once there is room for all that it may hold, by priority and then in the order of arrival: none that
    waits for room is overtaken by one behind it. One whose prompt begins like the text of another begins with a copy of that
    one's KV. What its events change takes effect with `next_instructions`.
    """

    def __init__(self, limits: Limits, rooms: Rooms) -> None:
        self._limits = limits
        self._rooms = rooms
        self._waiting: list[Request] = []  # in the order of admission
        self._live: dict[str, Request] = {}
        self._flights: dict[int, list[tuple[Request, Part]]] = {}
        self._numbers = itertools.count()
        self._slots = itertools.count()
        self._arrivals = itertools.count()
        self._rests = itertools.count()
        self._index = PrefixIndex(limits.min_shared)
        self._by_slot: dict[int, Request | None] = {}  # None: kept
        self._is_full = False  # of memory, until a request ends
        self._outbox: list[Instruction] = []

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or live, and nothing is in flight."""
        return not (self._waiting or self._live or self._flights or self._outbox)

    @property
    def num_flights(self) -> int:
        """Microbatches in flight."""
        return len(self._flights)

    def add(self, request: Request) -> None:
        """Take in a request."""
        if not self._rooms.fits(request.needed):
            self._fail(request, None, request.needed)
            return
        request.arrival = next(self._arrivals)
        self._wait(request)

    def cancel(self, key: str) -> bool:
        """End a request, and its children that have not begun; return whether there was one."""
        for request in self._waiting:
            if request.key == key:
                self._waiting.remove(request)
                return True
        live = self._live.get(key)
        if live is None or (live.is_over and not live.begins_anew):
            return False
        live.children.clear()
        live.begins_anew = False
        if not live.is_over:
            self._retire(live)
        return True

    def end_step(self, number: int, outcomes: Mapping[str, Outcome]) -> None:
        """Record what came of a microbatch."""
        for request, part in self._flights.pop(number):
            outcome = outcomes[part.key]
            request.num_flights -= 1
            request.rested_since = next(self._rests)
            if request.is_over:
                self._settle(request)
            elif outcome.error is not None:
                self._recover(request, outcome)
            else:
                request.num_held += len(part.ids)
                if outcome.token is not None:
                    request.ids.append(outcome.token)
                    request.num_chosen += 1
                    if outcome.is_last:
                        self._retire(request)

    def end_copy(self, key: str, *, succeeded: bool) -> None:
        """Record that the KV that a request begins with has been copied; without it, its whole prompt is computed."""
        request = self._live[key]
        assert request.copies_from is not None
        slot, num_tokens, source = request.copies_from
        request.copies_from, request.is_copying = None, False
        self._return(slot, source)
        if succeeded:
            request.num_sent = request.num_held = num_tokens
        else:
            request.begins_anew, request.is_over = not request.is_over, True  # the copy has ended with its session
        if request.is_over:
            self._settle(request)

    def next_instructions(self) -> list[Instruction]:
        """Return what is to be done now; empty until another event if nothing is."""
        for slot in self._rooms.pop_given_up():
            self._forget(slot)
        for request in [each for each in self._live.values() if each.children and each.num_held == len(each.ids) - 1]:
            self._fork(request)
        self._begin()
        if not self._flights:  # those that ran may have given up their KV
            self._begin()
        instructions, self._outbox = self._outbox, []
        return instructions

    def _begin(self) -> None:
        """Admit what there is room for, and begin copies and microbatches."""
        self._admit()
        for request in self._live.values():
            if request.copies_from is not None and not request.is_copying:
                slot, num_tokens, source = request.copies_from
                if source is None or not source.num_flights:
                    request.is_copying = True
                    self._outbox.append(Copy(request.key, slot, request.slot, num_tokens))
        while len(self._flights) < self._limits.num_microbatches and (parts := self._compose()):
            number = next(self._numbers)
            self._flights[number] = parts
            self._outbox.append(Run(number, tuple(part for _, part in parts)))

    # --- admission ---

    def _wait(self, request: Request) -> None:
        bisect.insort(self._waiting, request, key=_turn)

    def _wait_again(self, request: Request) -> None:
        """Give up the KV of a request that there is no room for; its text is computed anew when there is."""
        self._live.pop(request.key, None)
        if not self._rooms.fits(request.needed):
            self._fail(request, None, request.needed)
            return
        self._wait(request)

    def _admit(self) -> None:
        """Admit requests in their order, until there is no room for the next one; those that wait for a common beginning stay."""
        most = self._limits.max_requests * self._limits.num_microbatches
        skipped: list[Request] = []
        for request in [*self._waiting]:
            if self._is_full or len(self._live) >= most:
                return
            if self._live and self._rooms.free_share() < self._limits.margin:
                return
            source, turn = self._find_source(request), _turn(request)
            if source is not None and source[1] == 0:
                skipped.append(request)
                continue
            if not self._open(request, source):
                return
            self._waiting.remove(request)
            # Those of equal priority behind it have arrived later: there may be thousands.
            behind = bisect.bisect_right(self._waiting, (*turn[:2], math.inf), key=_turn)
            overtaken = [each for each in (*skipped, *self._waiting[behind:]) if each.arrival < request.arrival]
            for other in overtaken:
                other.num_overtaken += 1
            if any(other.num_overtaken == _MAX_OVERTAKEN for other in overtaken):
                self._waiting.sort(key=_turn)

    def _find_source(self, request: Request) -> tuple[int, int] | None:
        """Return a slot to copy from, and how many tokens; 0 tokens: once they have been computed."""
        for slot, num_common in self._index.find(request.ids):
            source = self._by_slot[slot]
            if source is None or source.num_held >= num_common:
                return slot, num_common
            if not source.is_over and not source.children and source.num_chosen == 0:
                return slot, 0
        return None

    def _open(self, request: Request, source: tuple[int, int] | None) -> bool:
        """Reserve room for a request and make it live; return whether there is room."""
        lender = None
        if source is not None:
            lender = self._by_slot[source[0]]
            if lender is not None:
                lender.num_borrowers += 1
            elif not self._rooms.pin(source[0]):
                source = None  # it has been given up meanwhile
        if not self._reserve(request):
            if source is not None:
                self._return(source[0], lender)
                return False if lender is not None else self._open(request, None)
            return False
        request.copies_from = None if source is None else (*source, lender)
        request.num_overtaken = 0
        self._live[request.key] = request
        self._outbox.append(Admitted(request.key))
        return True

    def _reserve(self, request: Request) -> bool:
        """Reserve a slot for all that a request needs; without a limit, for some tokens more than it has."""
        slot, num_tokens = next(self._slots), request.needed
        if request.max_new is None and self._rooms.fits(num_tokens + _GRANULE_TOKENS):
            num_tokens += _GRANULE_TOKENS
        if not self._rooms.reserve(slot, num_tokens):
            return False
        request.slot, request.num_reserved = slot, num_tokens
        self._by_slot[slot] = request
        self._index.add(slot, request.ids)
        return True

    def _return(self, slot: int, lender: Request | None) -> None:
        """End the use of a slot as a source."""
        if lender is None:
            self._rooms.unpin(slot)
            return
        lender.num_borrowers -= 1
        if lender.is_over:
            self._settle(lender)

    def _fork(self, request: Request) -> None:
        """Begin the children of a request whose prompt has been computed but for its last token."""
        children, request.children = request.children, []
        for child in children:
            child.arrival = request.arrival
            source = (request.slot, request.num_held) if request.num_held else None
            if not self._open(child, source):
                self._wait(child)

    # --- microbatches ---

    def _compose(self) -> list[tuple[Request, Part]]:
        """Return the parts of the next microbatch."""
        limits = self._limits
        live = [each for each in self._live.values() if not each.is_over]
        ready = sorted((each for each in live if each.decodes and each.left), key=lambda each: each.rested_since)
        num_fair = math.ceil(sum(each.decodes for each in live) / limits.num_microbatches)
        prompts = sorted((each for each in live if not each.decodes and each.left), key=_turn)
        parts: list[tuple[Request, Part]] = []
        room = limits.max_tokens
        if limits.prompts_first:
            parts += self._chunks(prompts, room)
            room -= sum(len(part.ids) for _, part in parts)
        for request in ready[: min(num_fair, room, limits.max_requests - len(parts))]:
            if self._grow(request):
                parts.append((request, self._send(request, 1)))
        if not limits.prompts_first:
            parts += self._chunks(prompts, room - len(parts), len(parts))
        return parts

    def _chunks(self, prompts: list[Request], room: int, num_parts: int = 0) -> Iterator[tuple[Request, Part]]:
        """Send chunks of prompts; the first one may be cut to fit, the others go whole or wait."""
        num_left = min(self._limits.chunk_tokens, room)
        is_first = True
        for request in prompts[: self._limits.max_requests - num_parts]:
            size = min(request.left, self._limits.chunk_tokens)
            if is_first:
                size = min(size, room)
            if 0 < size <= num_left:
                yield request, self._send(request, size)
                num_left -= size
                is_first = False

    def _send(self, request: Request, num_tokens: int) -> Part:
        first = request.num_sent
        request.num_sent += num_tokens
        request.num_flights += 1
        ids = tuple(request.ids[first : request.num_sent])
        return Part(request.key, request.slot, ids, request.num_sent == len(request.ids))

    def _grow(self, request: Request) -> bool:
        """Reserve room for the next token of a request without a limit; without room, it waits and begins anew."""
        if request.needed <= request.num_reserved:
            return True
        for num_tokens in (request.needed + _GRANULE_TOKENS, request.needed):
            if self._rooms.reserve(request.slot, num_tokens):
                request.num_reserved = num_tokens
                return True
        self._free(request)
        self._wait_again(request)
        return False

    # --- ends ---

    def _recover(self, request: Request, outcome: Outcome) -> None:
        """Go on after an error that has ended the KV of a request: again if it lacked memory that others hold, else not at all."""
        others = [each for each in self._live.values() if each is not request]
        if outcome.lacks_memory and (self._rooms.give_up() or others):
            self._is_full = bool(others)
            request.is_over = request.begins_anew = True
            self._settle(request)  # not before its later chunks have failed as well
            return
        for child in request.children:
            self._outbox.append(Failed(child.key, outcome.error))
        request.children = []
        self._retire(request, keeps=False)
        self._outbox.append(Failed(request.key, outcome.error))

    def _fail(self, request: Request, error: Exception | None, num_needed: int = 0) -> None:
        self._outbox += [Failed(each.key, error, num_needed) for each in (request, *request.children)]

    def _retire(self, request: Request, *, keeps: bool = True) -> None:
        request.is_over = True
        if not keeps:
            request.num_held = 0
        self._settle(request)

    def _settle(self, request: Request) -> None:
        """Free the slot of a request that is over, or keep its KV for others, once nothing uses it."""
        if request.num_flights or request.num_borrowers or request.copies_from is not None:
            return
        if request.begins_anew:
            request.is_over = request.begins_anew = False
            self._free(request)
            self._wait_again(request)
            return
        del self._live[request.key]
        self._is_full = False
        if request.num_held <= self._limits.min_shared:
            self._free(request)
            return
        self._rooms.keep(request.slot, request.num_held)
        self._index.add(request.slot, request.ids[: request.num_held])
        self._by_slot[request.slot] = None

    def _free(self, request: Request) -> None:
        self._forget(request.slot)
        self._rooms.free(request.slot)
        request.slot, request.num_reserved, request.num_sent, request.num_held = -1, 0, 0, 0

    def _forget(self, slot: int) -> None:
        self._index.discard(slot)
        del self._by_slot[slot]


def _turn(request: Request) -> tuple[bool, int, int]:
    return request.num_overtaken < _MAX_OVERTAKEN, -request.priority, request.arrival

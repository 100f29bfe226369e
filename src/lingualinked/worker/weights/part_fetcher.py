"""Parts of a checkpoint's files fetched from several sources at once, each as fast as it answers, for a stage that is loading.

Knows ranges, sources and how to request; the loading thread waits here for what the worker's loop receives. No sockets.
"""

from __future__ import annotations

import dataclasses
import heapq
import queue
import threading
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.model.weight_files.byte_ranges import (
    ByteRange,
    checksum_bytes,
    cut_ranges,
    intersect_ranges,
    merge_ranges,
    subtract_ranges,
)
from lingualinked.model.weight_files.fetching import DeliverPart, FetchError
from lingualinked.model.weight_files.shared_parts import MAX_PARTS_IN_FLIGHT
from lingualinked.protocol.weights import FilePart, WeightSupply, range_of
from lingualinked.quantities import count_text
from lingualinked.transport.wire.tensor_bytes import memory_of

_SILENT_S = 5.0
"""Seconds without an answer after which a source is replaced, if others have what it was asked for."""

_TURN_S = 0.5
"""Seconds between two looks at whether the stage is still wanted, and sources still answer."""

_REPORT_S = 0.1
"""Seconds between two reports of progress, at least."""

RequestPart = Callable[[str, ByteRange, int], None]
"""Requests a part of a source, with the receipt of one that came from there before; called in the loading thread."""


@dataclasses.dataclass(slots=True)
class _Source:
    """What is known of one source, and what it was asked for; `failure` says why it is not asked any more."""

    name: str
    receipts: list[int] = dataclasses.field(default_factory=lambda: [0] * MAX_PARTS_IN_FLIGHT)  # one for each request
    in_flight: set[ByteRange] = dataclasses.field(default_factory=set)
    heard_s: float = 0.0  # when it last answered, or was asked while nothing was in flight
    failure: str = ""

    def __str__(self) -> str:
        return "the caller" if self.name == CALLER else f"device {self.name!r}"


class PartFetcher:
    """A `lingualinked.model.weight_files.fetching.Fetcher` of what the parties in `supplies` have.

    Parts are requested with `request_part` and delivered by `deliver_part`. A source that fails, dies, sends a part that does
    not match its checksum, or is silent while others have what it was asked for, is replaced by the others.
    """

    def __init__(
        self,
        supplies: Sequence[WeightSupply],
        file_names: Sequence[str],
        request_part: RequestPart,
        call_on_loop: Callable[[Callable[[], None]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources = {each.name: _Source(each.name) for each in supplies}
        self._held = {
            each.name: None if each.ranges is None else merge_ranges(ByteRange(*bounds) for bounds in each.ranges)
            for each in supplies
        }
        self._file_names = file_names
        self._request_part = request_part
        self._call_on_loop = call_on_loop
        self._loop_answered: threading.Event | None = None  # asked in the turn before
        self.check_wanted: Callable[[], None] = lambda: None  # raises once the stage is no longer wanted
        self.on_fetched: Callable[[int], None] = lambda num_bytes: None  # told the bytes fetched so far
        self._num_fetched = 0
        self._reported_s = 0.0
        self._clock = clock
        self._events: queue.SimpleQueue[tuple[str, FilePart | str, Tensor | None]] = queue.SimpleQueue()
        self._missing: dict[ByteRange, tuple[str, ...]] = {}  # the parts that have not come, with who has them
        self._queues: dict[tuple[str, ...], list[ByteRange]] = {}  # heaps of those not requested, by who has them

    def fetch(self, ranges: Sequence[ByteRange], deliver: DeliverPart) -> None:
        """Fetch ranges: return once `deliver` has been called in this thread with all of them.

        Raises FetchError if no source has a part, with what became of each of them.
        """
        # 1) queue the parts by who has them
        groups = [(merge_ranges(ranges), tuple(name for name, held in self._held.items() if held is None))]
        for name, held in self._held.items():
            if held is not None:
                groups = [
                    group
                    for wanted, names in groups
                    for group in (
                        (intersect_ranges(wanted, held), (*names, name)),
                        (subtract_ranges(wanted, held), names),
                    )
                ]
        self._queues.clear()
        self._missing = {part: names for wanted, names in groups for part in cut_ranges(wanted)}
        for part in self._missing:
            self._queue_part(part)
        # 2) keep every source busy until all have come
        while self._missing:
            self._request_parts()
            self._check_reachable()
            self._handle_event(deliver)

    def check_cancelled(self) -> None:
        """Raise an exception once the stage is not wanted any more."""
        self.check_wanted()

    def deliver_part(self, source: str, part: FilePart, data: Tensor | None) -> None:
        """Deliver an answer to the loading thread; called on the worker's loop."""
        self._events.put((source, part, data))

    def lose_source(self, source: str, why: str) -> None:
        """Stop asking a source; called on the worker's loop."""
        self._events.put((source, why, None))

    def _queue_part(self, part: ByteRange) -> None:
        names = tuple(name for name in self._missing[part] if not self._sources[name].failure)
        heapq.heappush(self._queues.setdefault(names, []), part)

    def _request_parts(self) -> None:
        """Request as much of every source as may be in flight there: of what it has, what the fewest others have."""
        for source in self._sources.values():
            while source.receipts and not source.failure:
                own = [names for names, parts in self._queues.items() if parts and source.name in names]
                if not own:
                    break
                part = heapq.heappop(self._queues[min(own, key=len)])
                if part not in self._missing:
                    continue  # a source that had been replaced has sent it after all
                if not source.in_flight:
                    source.heard_s = self._clock()
                source.in_flight.add(part)
                self._request_part(source.name, part, source.receipts.pop())

    def _check_reachable(self) -> None:
        """Raise FetchError if a part can come from nobody."""
        parts = self._queues.get(())
        while parts:
            part = heapq.heappop(parts)
            if part not in self._missing:
                continue
            sources = [self._sources[name] for name in self._missing[part]]
            reasons = "; ".join(f"{source} {source.failure}" for source in sources) or "no party has them"
            raise FetchError(
                f"bytes [{part.start}, {part.stop}) of {self._file_names[part.file]} can't be fetched: {reasons}"
            )

    def _handle_event(self, deliver: DeliverPart) -> None:
        self.check_wanted()
        try:
            name, answer, data = self._events.get(timeout=_TURN_S)
        except queue.Empty:
            self._replace_silent()
            return
        self._loop_answered = None
        source = self._sources[name]
        if isinstance(answer, str):
            self._fail(source, answer)
            return
        part = range_of(answer)
        source.heard_s = self._clock()
        if part in source.in_flight:
            source.in_flight.discard(part)
            source.receipts.append(answer.receipt)
        if part not in self._missing:
            return  # another source was faster
        if answer.error or data is None or not data.numel():
            self._fail(source, answer.error or "sent no bytes", part)
            return
        memory = memory_of(data)
        if len(memory) != part.num_bytes or checksum_bytes(memory) != answer.checksum:
            found = count_text(len(memory), "byte")
            self._fail(source, f"sent {found} for {part.num_bytes}, or others than its checksum says", part)
            return
        deliver(part, memory)
        del self._missing[part]
        self._num_fetched += part.num_bytes
        if source.heard_s >= self._reported_s + _REPORT_S:
            self._reported_s = source.heard_s
            self.on_fetched(self._num_fetched)

    def _replace_silent(self) -> None:
        """Replace sources that have not answered for a while, if others have what they were asked for."""
        # While a step holds up this worker's own loop, answers may be waiting there: it must have answered just now.
        if self._loop_answered is None:
            self._loop_answered = threading.Event()
            self._call_on_loop(self._loop_answered.set)
            return
        if not self._loop_answered.is_set():
            return
        self._loop_answered = None
        now = self._clock()
        for source in self._sources.values():
            silent_s = now - source.heard_s
            if source.failure or not source.in_flight or silent_s < _SILENT_S:
                continue
            if all(self._has_other(part, source.name) for part in source.in_flight):
                self._fail(source, f"did not answer within {silent_s:.0f} s")

    def _has_other(self, part: ByteRange, name: str) -> bool:
        names = self._missing.get(part)  # None: a source that had been replaced has sent it after all
        return names is None or any(other != name and not self._sources[other].failure for other in names)

    def _fail(self, source: _Source, why: str, *parts: ByteRange) -> None:
        """Ask a source no more, and queue what it was asked for again, for the others."""
        source.failure = source.failure or why
        for part in (*source.in_flight, *parts):
            if part in self._missing:
                self._queue_part(part)
        source.in_flight.clear()
        for names in [names for names in self._queues if source.name in names]:
            for part in self._queues.pop(names):
                if part in self._missing:
                    self._queue_part(part)

"""Exports a history as a timeline for the Perfetto UI.

Knows the trace-event format; uses only the caller's clock.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.history import History
from lingualinked.telemetry.plain import plain
from lingualinked.telemetry.samples import DeviceSample, StageTiming, StepSample
from lingualinked.telemetry.timeline import stage_intervals, windows_of
from lingualinked.whole_file import write_whole_file

PIPELINE, LIVE = 1, 2
"""The two groups of tracks: events, and counters."""

MIN_SLICE_NS = 2
"""The shortest slice that the end of an arrow can lie in."""

MIN_WAIT_S = 1e-6
"""Shorter waits are not drawn."""

Event = dict[str, Any]
_Place = tuple[str, int, int]


def trace_of(history: History) -> dict[str, Any]:
    """Convert a history to the trace-event format, in microseconds since the start of the recording.

    Each stage has a track with slices for compute and for encoding and decoding, and tracks for the steps that wait for it.
    The caller has a track for whole steps, or one per concurrent step. Arrows mark the hops. Decisions are instants and
    migrations are slices, each on their own track; tokens per second, memory and temperature are counters. Events that
    ended before the first step in the history are omitted.

    Times are on the caller's clock, reconstructed from durations (see `stage_intervals`). If measurement errors would make
    two steps overlap on one stage, the later slice begins where the earlier one ends, because slices of a track must not
    overlap. The measured seconds are arguments of each slice.

    References
    ----------
    Trace Event Format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    return _Trace(history).to_dict()


def write_trace(history: History, path: str | os.PathLike[str]) -> Path:
    """Write a history as a trace file, atomically; an existing file is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole_file(path, msgspec.json.encode(trace_of(history)).decode())
    return path


@dataclasses.dataclass(slots=True)
class _Visit:
    """A stage's part in a step as drawn, in integer nanoseconds: starts of wait, compute and codec, and the end."""

    timing: StageTiming
    wait_ns: int
    start_ns: int
    codec_ns: int
    end_ns: int


class _Trace:
    """Collects the events of one history and sorts them by time."""

    def __init__(self, history: History) -> None:
        times_s = [
            *(step.time_s for step in history.steps),
            *(sample.time_s for sample in history.devices),
            *(decision.time_s for decision in history.decisions),
            *(migration.time_s for migration in history.migrations),
        ]
        self._origin_s = min(history.start_s, *times_s) if times_s else history.start_s
        self._first_s = min((step.time_s for step in history.steps), default=self._origin_s)
        self._events: list[Event] = []
        self._metadata: list[Event] = []
        self._num_tracks = 0
        self._num_arrows = 0
        self._add_name("process_name", PIPELINE, 0, "pipeline")
        self._add_name("process_name", LIVE, 0, "live")
        self._add_steps(history.steps)
        self._add_changes(history.decisions, history.migrations)
        self._add_rates(history)
        self._add_devices(history.devices)

    def to_dict(self) -> dict[str, Any]:
        """Return the trace; a slice comes before the slices within it."""
        self._events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
        return {
            "traceEvents": self._metadata + self._events,
            "displayTimeUnit": "ms",
            "otherData": {"made_by": "lingualinked"},
        }

    def _add_steps(self, steps: Sequence[StepSample]) -> None:
        visits = self._visits(steps)
        ends_ns = [
            max(
                self._ns(step.end_s),
                self._ns(step.time_s) + MIN_SLICE_NS,
                *(visit.end_ns + MIN_SLICE_NS for visit in each),
            )
            for step, each in zip(steps, visits, strict=True)
        ]
        spans_ns = [(self._ns(step.time_s), end_ns) for step, end_ns in zip(steps, ends_ns, strict=True)]
        caller = self._lanes("caller", spans_ns)
        waits: dict[_Place, list[tuple[int, int]]] = {}
        for visit in (visit for each in visits for visit in each):
            waits.setdefault(_place(visit.timing), [])
            if visit.timing.wait_s >= MIN_WAIT_S:
                waits[_place(visit.timing)].append((visit.wait_ns, visit.start_ns))
        tracks, queues = {}, {}
        for place, spans in waits.items():  # in the order in which the first step of each plan visits them
            tracks[place] = self._track(_name(place))
            queues[place] = iter(self._lanes(f"{_name(place)} waiting", spans))
        for step, each, (start_ns, end_ns), lane in zip(steps, visits, spans_ns, caller, strict=True):
            kind = "decode" if step.is_decode else "prefill"
            kind += "" if step.microbatch is None else f", microbatch {step.microbatch}"
            label = {"session": step.session, "step": step.number}
            self._add_slice(lane, kind, start_ns, end_ns, _arguments(step))
            tail = (lane, start_ns + 1)
            for visit in each:
                place = _place(visit.timing)
                track = tracks[place]
                if visit.timing.wait_s >= MIN_WAIT_S:
                    self._add_slice(next(queues[place]), "wait", visit.wait_ns, visit.start_ns, label)
                arguments = label | plain(visit.timing)
                self._add_slice(track, kind, visit.start_ns, visit.codec_ns, arguments)
                if visit.end_ns > visit.codec_ns:
                    self._add_slice(track, "encode and decode", visit.codec_ns, visit.end_ns, label)
                self._add_arrow(tail, (track, visit.start_ns + 1))
                tail = (track, visit.end_ns - 1)
            if each:
                self._add_arrow(tail, (lane, end_ns - 1))

    def _visits(self, steps: Sequence[StepSample]) -> list[list[_Visit]]:
        """Lay out every stage's part in every step so that slices don't overlap and hops lead forwards in time."""
        parts = [stage_intervals(step) for step in steps]
        # Earliest first over all steps, and stages in order: then everything that must come before a part is placed already.
        order = sorted(
            (interval.start_s, index, stage) for index, part in enumerate(parts) for stage, interval in enumerate(part)
        )
        free_ns: dict[_Place, int] = {}
        visits: list[list[_Visit]] = [[] for _ in steps]
        for _, index, stage in order:
            timing, interval, before = steps[index].stages[stage], parts[index][stage], visits[index]
            earliest_ns = before[-1].end_ns if before else self._ns(steps[index].time_s)
            wait_ns = max(self._ns(interval.arrival_s), earliest_ns)
            free = free_ns.get(_place(timing), 0)
            start_ns = max(
                self._ns(interval.start_s), wait_ns + (MIN_SLICE_NS if timing.wait_s >= MIN_WAIT_S else 0), free
            )
            end_ns = max(self._ns(interval.end_s), start_ns + MIN_SLICE_NS)
            work_s = timing.compute_s + timing.codec_s
            codec_ns = start_ns + round((end_ns - start_ns) * (timing.compute_s / work_s if work_s > 0 else 1.0))
            codec_ns = max(codec_ns, start_ns + MIN_SLICE_NS)
            if end_ns - codec_ns < MIN_SLICE_NS:
                codec_ns = end_ns
            free_ns[_place(timing)] = end_ns
            before.append(_Visit(timing, wait_ns, start_ns, codec_ns, end_ns))
        return visits

    def _add_changes(self, decisions: Iterable[Decision], migrations: Iterable[Migration]) -> None:
        moved = [each for each in migrations if each.end_s >= self._first_s]
        decided = [each for each in decisions if each.time_s >= self._first_s]
        if decided:
            track = self._track("decisions")
            for decision in decided:
                name = f"would {decision.action}" if decision.dry_run else decision.action
                at_ns, arguments = self._ns(decision.time_s), _arguments(decision)
                self._add_event(name, "i", track, at_ns, cat="decision", s="t", args=arguments)
        spans_ns = [
            (start_ns, max(self._ns(each.end_s), start_ns + MIN_SLICE_NS))
            for each in moved
            for start_ns in (self._ns(each.time_s),)
        ]
        for each, span_ns, lane in zip(moved, spans_ns, self._lanes("migrations", spans_ns), strict=True):
            self._add_slice(lane, "migration" if each.succeeded else "failed migration", *span_ns, _arguments(each))

    def _add_rates(self, history: History) -> None:
        if history.end_s <= self._first_s or not history.steps:
            return
        num_windows = min(1000, max(1, round((history.end_s - self._first_s) / 0.25)))
        windows = windows_of(history.steps, self._first_s, history.end_s, num_windows)
        for time_s, rate in zip(windows.edges_s, (*windows.tokens_per_s, 0.0), strict=True):
            self._add_counter("tokens/s", time_s, rate)

    def _add_devices(self, samples: Iterable[DeviceSample]) -> None:
        for sample in samples:
            if sample.time_s < self._first_s:
                continue
            self._add_counter(f"{sample.device}: memory held, MiB", sample.time_s, sample.held_bytes / 1024**2)
            self._add_counter(f"{sample.device}: CPU, %", sample.time_s, sample.cpu_percent)
            if sample.temperature_c is not None:
                self._add_counter(f"{sample.device}: temperature, °C", sample.time_s, sample.temperature_c)
            if sample.battery_percent is not None:
                self._add_counter(f"{sample.device}: battery, %", sample.time_s, sample.battery_percent)

    def _lanes(self, name: str, spans_ns: Sequence[tuple[int, int]]) -> list[int]:
        """Assign each interval to a track without overlaps, using as few tracks as possible."""
        chosen = [0] * len(spans_ns)
        lanes: list[int] = []
        busy: list[tuple[int, int]] = []
        for index in sorted(range(len(spans_ns)), key=spans_ns.__getitem__):
            start_ns, end_ns = spans_ns[index]
            if busy and busy[0][0] <= start_ns:
                _, lane = heapq.heappop(busy)
            else:
                lanes.append(self._track(f"{name} {len(lanes) + 1}" if lanes else name))
                lane = lanes[-1]
            chosen[index] = lane
            heapq.heappush(busy, (end_ns, lane))
        return chosen

    def _track(self, name: str) -> int:
        self._num_tracks += 1
        self._add_name("thread_name", PIPELINE, self._num_tracks, name)
        order: Event = {"name": "thread_sort_index", "ph": "M", "pid": PIPELINE, "tid": self._num_tracks}
        self._metadata.append(order | {"args": {"sort_index": self._num_tracks}})
        return self._num_tracks

    def _add_name(self, kind: str, group: int, track: int, name: str) -> None:
        self._metadata.append({"name": kind, "ph": "M", "pid": group, "tid": track, "args": {"name": name}})

    def _add_slice(self, track: int, name: str, start_ns: int, end_ns: int, arguments: Event) -> None:
        self._add_event(name, "X", track, start_ns, dur=(end_ns - start_ns) / 1e3, cat="pipeline", args=arguments)

    def _add_arrow(self, tail: tuple[int, int], head: tuple[int, int]) -> None:
        self._num_arrows += 1
        self._add_event("hop", "s", *tail, cat="hop", id=self._num_arrows)
        self._add_event("hop", "f", *head, cat="hop", id=self._num_arrows, bp="e")

    def _add_counter(self, name: str, time_s: float, value: float) -> None:
        self._add_event(name, "C", 0, self._ns(time_s), pid=LIVE, args={"value": value})

    def _add_event(self, name: str, phase: str, track: int, time_ns: int, **fields: Any) -> None:
        self._events.append({"name": name, "ph": phase, "ts": time_ns / 1e3, "pid": PIPELINE, "tid": track} | fields)

    def _ns(self, time_s: float) -> int:
        return round((time_s - self._origin_s) * 1e9)


def _place(timing: StageTiming) -> _Place:
    return timing.device, timing.start, timing.end


def _name(place: _Place) -> str:
    device, start, end = place
    return f"{device} [{start}, {end})"


def _arguments(record: StepSample | Decision | Migration) -> Event:
    arguments = plain(record)
    arguments.pop("stages", None)
    return arguments

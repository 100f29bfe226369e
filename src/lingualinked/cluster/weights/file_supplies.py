"""Finds out what workers on other hosts lack of a checkpoint's files, and arranges who sends it to them.

Knows loads, ranges and which worker may have what; sends no bytes of files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import msgspec

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import result_of
from lingualinked.cluster.weights.file_sharing import SharedLoad
from lingualinked.device import CALLER
from lingualinked.errors import CheckpointError, LingualinkedError
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.byte_ranges import ByteRange, intersect_ranges, subtract_ranges
from lingualinked.model.weight_files.describing import describe_contents
from lingualinked.model.weight_files.span_ranges import ranges_of_span
from lingualinked.protocol.weights import FindFiles, Ranges, ShareFiles, WeightSupply

if TYPE_CHECKING:
    from lingualinked.protocol.weights import FilesFound

_MOST_RANGES = 10_000
"""Ranges that a worker may say it has: tensors are adjacent, and what it is said to have is told to the others."""

_FIND_S = 5.0
"""Seconds that a worker has to say what it has for others: one that is busy for longer is no source."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileLoad:
    """A stage that a worker is to load, by the number of the request."""

    number: int
    device: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Supplies:
    """The model as its workers on other hosts are sent it; by the number of each load, from whom it may fetch what."""

    spec: ModelSpec
    of_load: dict[int, tuple[WeightSupply, ...]]
    shared: dict[int, SharedLoad]


def arrange_supplies(
    engine: Engine, spec: ModelSpec, loads: Sequence[FileLoad], timeout_s: float, *, is_move: bool
) -> Supplies:
    """Make every worker that has some send the files that workers on other hosts need for their loads.

    They do until `Engine.end_sharing`, as the caller does from `Engine.share_files` on. Raises CheckpointError if the caller's
    files can't be read; in a move there is then nobody to fetch them from, since the weights are in workers' memory, too.
    """
    loads = [load for load in loads if load.device in engine.fetching]
    if not loads or spec.load_format != "safetensors":
        return Supplies(spec=spec, of_load={}, shared={})
    # 1) find out what each load needs, and what every worker has
    try:
        described = _describe(spec)
        needed = {load.number: ranges_of_span(spec, load.start, load.end) for load in loads}
        found = _find_files(engine, described, {load.device for load in loads}, timeout_s)
        if any(found[load.device].verifies for load in loads if load.device in found):
            described = _describe(spec, verify=True)
    except CheckpointError:
        if is_move:
            return Supplies(spec=spec, of_load={}, shared={})
        raise
    held = {name: tuple(ByteRange(*bounds) for bounds in each.ranges) for name, each in found.items()}
    # 2) make those that have something send it to those that lack it
    supplies: dict[int, dict[str, tuple[ByteRange, ...]]] = {load.number: {} for load in loads}
    asked: list[tuple[int, str, concurrent.futures.Future[object]]] = []
    for load in loads:
        lacking = subtract_ranges(needed[load.number], held.get(load.device, ()))
        for name, ranges in held.items():
            if name == load.device or not _trusts(engine, load.device, name) or not intersect_ranges(lacking, ranges):
                continue
            lent = supplies[load.number][name] = intersect_ranges(needed[load.number], ranges)
            message = ShareFiles(
                request=engine.next_request(),
                load=load.number,
                borrower=load.device,
                spec=described,
                ranges=_bounds(lent),
            )
            future = engine.request(name, message, "sharing files", min(timeout_s, _FIND_S))
            asked.append((load.number, name, future))
            del future  # see `result_of`
    names = {number: tuple(others) for number, others in supplies.items()}
    while asked:
        number, name = asked[0][:2]
        try:
            result_of(asked.pop(0)[2])
        except LingualinkedError:
            del supplies[number][name]  # the others, and the caller, have it too
    # 3) add the caller, who has everything
    own = WeightSupply(name=CALLER, ranges=None)
    return Supplies(
        spec=described,
        of_load={
            number: (own, *(WeightSupply(name=name, ranges=_bounds(ranges)) for name, ranges in others.items()))
            for number, others in supplies.items()
        },
        shared={
            load.number: SharedLoad(
                number=load.number,
                borrower=load.device,
                spec=spec,
                ranges=needed[load.number],
                sources=names[load.number],
            )
            for load in loads
        },
    )


@functools.lru_cache(maxsize=16)
def _describe(spec: ModelSpec, *, verify: bool = False) -> ModelSpec:
    return describe_contents(spec, verify=verify)


def _find_files(engine: Engine, spec: ModelSpec, loading: set[str], timeout_s: float) -> dict[str, FilesFound]:
    """Ask workers on other hosts what they have: those that load, and those they may fetch from; the silent have nothing."""
    askable = {name for name in engine.fetching if any(_trusts(engine, each, name) for each in loading)}
    asked = []
    for name in sorted(askable - engine.ended_devices()):
        message = FindFiles(request=engine.next_request(), spec=spec)
        patience_s = timeout_s if name in loading else min(timeout_s, _FIND_S)
        asked.append((name, engine.request(name, message, "looking for files", patience_s)))
    found = {}
    while asked:
        name = asked[0][0]
        with contextlib.suppress(LingualinkedError):
            answer = cast("FilesFound", result_of(asked.pop(0)[1]))
            has_too_many = len(answer.ranges) > _MOST_RANGES
            found[name] = msgspec.structs.replace(answer, ranges=()) if has_too_many else answer
    return found


def _trusts(engine: Engine, borrower: str, source: str) -> bool:
    """Return whether a worker may fetch files from another: what trusted ones have and hold comes from such and stays there."""
    return (borrower in engine.trusted) == (source in engine.trusted)


def _bounds(ranges: Iterable[ByteRange]) -> Ranges:
    return tuple((each.file, each.start, each.stop) for each in ranges)

"""The messages about bytes of a checkpoint's files, which workers fetch that can't read the caller's, as msgspec structs.

Knows neither who has which bytes nor what they are for. A part's bytes are sent with a message, never in it.
"""

from __future__ import annotations

from lingualinked.model.spec import ModelSpec
from lingualinked.model.weight_files.byte_ranges import ByteRange
from lingualinked.model.weight_files.part_server import ServedPart
from lingualinked.protocol.base import Message, Natural

Ranges = tuple[tuple[Natural, Natural, Natural], ...]
"""Bytes ``[start, stop)`` of files, each as (place of the file in ``ModelSpec.contents``, start, stop), in order and apart."""


class WeightSupply(Message, frozen=True):
    """A party that files of a checkpoint may be fetched from, and what it has of them; ``None``: all."""

    name: str
    ranges: Ranges | None


class FindFiles(Message, frozen=True, tag=64):
    """Ask a worker what it has of a checkpoint's files, as copies of its own or in its cache."""

    request: int
    spec: ModelSpec


class FilesFound(Message, frozen=True, tag=65):
    """Answer to `FindFiles`: what is here, and whether this worker is to compare all bytes with the caller's."""

    request: int
    ranges: Ranges
    verifies: bool


class ShareFiles(Message, frozen=True, tag=66):
    """Send parts of these ranges of a checkpoint's files to a worker that asks, for the `LoadStage` of number ``load``."""

    request: int
    load: int
    borrower: str
    spec: ModelSpec
    ranges: Ranges


class StopSharing(Message, frozen=True, tag=69):
    """Exchange no more parts with a party for a `LoadStage` of that number: it needs no more, or has ended."""

    load: int
    name: str
    reason: str


class FetchPart(Message, frozen=True, tag=67):
    """Send bytes ``[start, start + num_bytes)`` of a file, at most 1 MiB, for a `LoadStage` of that number.

    ``receipt`` is that of a `FilePart` that has been received, each named once, or 0 at first: only a few may be in flight.
    """

    load: int
    file: Natural
    start: Natural
    num_bytes: Natural
    receipt: int


class FilePart(Message, frozen=True, tag=68):
    """Answer to `FetchPart`: the bytes, sent with it, and their checksum; or the reason for sending none."""

    load: int
    file: Natural
    start: Natural
    num_bytes: Natural
    checksum: Natural
    error: str
    receipt: int


WeightMessage = StopSharing | FetchPart | FilePart
"""The messages that move parts of files."""


def range_of(message: FetchPart | FilePart) -> ByteRange:
    """Return the bytes that a message is about."""
    return ByteRange(message.file, message.start, message.start + message.num_bytes)


def answer_with(served: ServedPart) -> FilePart:
    """Return the message with which a part is sent that was requested."""
    return FilePart(
        load=served.load,
        file=served.part.file,
        start=served.part.start,
        num_bytes=served.part.num_bytes,
        checksum=served.checksum,
        error=served.error,
        receipt=served.receipt,
    )

"""The record of which parts of a sparse file are whole on disk, with their checksums; only ever appended to.

Knows one file of records; not the bytes that they are about.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from lingualinked.model.weight_files.byte_ranges import PART_BYTES, ByteRange, checksum_bytes, merge_ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_FIELDS = struct.Struct("<QQQ")  # start, stop, checksum; a part that was dropped has start and stop exchanged
_RECORD_BYTES = _FIELDS.size + 8  # the record's own checksum follows: a torn or damaged record is ignored


class StoredPart(NamedTuple):
    """Bytes ``[start, stop)`` of a file, no more than `PART_BYTES`, and their checksum."""

    start: int
    stop: int
    checksum: int


class PartJournal:
    """The parts of one file, as this process last read them; several processes may append at once.

    A process that is killed while it appends leaves a torn record at the end, which the next one removes. The file is open
    only while it is read or written: a model may have more files than a process may open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_read = 0
        self.parts: list[StoredPart] = []  # in order; ones that overlap, if two processes wrote them
        self.held: tuple[ByteRange, ...] = ()  # the parts, merged, as ranges of a file 0

    def read_new(self) -> None:
        """Read what other processes have appended, and this one."""
        with self._open() as descriptor:
            self._read_new(descriptor)

    def add_parts(self, parts: Iterable[StoredPart]) -> None:
        """Record parts whose bytes are on disk."""
        self._append([(each.start, each.stop, each.checksum) for each in parts])

    def drop_parts(self, parts: Iterable[StoredPart]) -> None:
        """Record that parts are not on disk after all, nor is any other that overlaps them."""
        self._append([(each.stop, each.start, 0) for each in parts])

    def forget_all(self) -> None:
        """Record that nothing is on disk."""
        with self._open() as descriptor:
            os.ftruncate(descriptor, 0)
            self._read_new(descriptor)

    def find_parts(self, start: int, stop: int) -> Sequence[StoredPart]:
        """Return the parts that overlap ``[start, stop)``."""
        first = bisect.bisect_left(self.parts, (start - PART_BYTES,))
        last = bisect.bisect_left(self.parts, (stop,))
        return [each for each in self.parts[first:last] if each.stop > start]

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _read_new(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size < self._num_read:
            self._num_read, self.parts, self.held = 0, [], ()
        data = os.pread(descriptor, size - self._num_read, self._num_read)
        data = data[: len(data) // _RECORD_BYTES * _RECORD_BYTES]
        new: list[StoredPart] = []
        has_dropped = False
        for offset in range(0, len(data), _RECORD_BYTES):
            fields = data[offset : offset + _FIELDS.size]
            check = int.from_bytes(data[offset + _FIELDS.size : offset + _RECORD_BYTES], "little")
            start, stop, checksum = _FIELDS.unpack(fields)
            if checksum_bytes(fields) != check:
                continue
            if start < stop:
                new.append(StoredPart(start, stop, checksum))
            else:
                has_dropped = True
                new = [each for each in new if each.stop <= stop or start <= each.start]
                self.parts = [each for each in self.parts if each.stop <= stop or start <= each.start]
        self._num_read += len(data)
        if new:
            self.parts = sorted({*self.parts, *new})
        if new or has_dropped:
            changed = self.parts if has_dropped else new
            before = () if has_dropped else self.held
            self.held = merge_ranges([*before, *(ByteRange(0, each.start, each.stop) for each in changed)])

    def _append(self, records: list[tuple[int, int, int]]) -> None:
        packed = [_FIELDS.pack(*each) for each in records]
        data = b"".join(each + checksum_bytes(each).to_bytes(8, "little") for each in packed)
        with self._open() as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
            end = os.fstat(descriptor).st_size // _RECORD_BYTES * _RECORD_BYTES  # before a torn record
            while data:
                num_written = os.pwrite(descriptor, data, end)
                data, end = data[num_written:], end + num_written
            self._read_new(descriptor)

"""The record of which parts of a sparse file are whole on disk, with their checksums; only ever appended to.

Knows one file of records; not the bytes that they are about.
"""

from __future__ import annotations

import bisect
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lingualinked.model.weight_files.byte_ranges import PART_BYTES, checksum_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_FIELDS = struct.Struct("<QQQ")  # start, stop, checksum; a part that was dropped has start and stop exchanged
_RECORD_BYTES = _FIELDS.size + 8  # the record's own checksum follows: a torn or damaged record is ignored


@dataclass(frozen=True, slots=True, order=True)
class StoredPart:
    """Bytes ``[start, stop)`` of a file, no more than `PART_BYTES`, and their checksum."""

    start: int
    stop: int
    checksum: int


class PartJournal:
    """The parts of one file, as this process last read them; several processes may append at once.

    A process that is killed while it appends leaves a torn record at the end, which the next one removes.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._num_read = 0
        self.parts: list[StoredPart] = []  # in order; equal ones, and ones that overlap, if two processes wrote them

    def read_new(self) -> None:
        """Read what other processes have appended, and this one."""
        size = os.fstat(self._descriptor).st_size
        if size < self._num_read:
            self._num_read, self.parts = 0, []
        data = os.pread(self._descriptor, (size - self._num_read) // _RECORD_BYTES * _RECORD_BYTES, self._num_read)
        data = data[: len(data) // _RECORD_BYTES * _RECORD_BYTES]
        new: list[StoredPart] = []
        for offset in range(0, len(data), _RECORD_BYTES):
            fields = data[offset : offset + _FIELDS.size]
            check = int.from_bytes(data[offset + _FIELDS.size : offset + _RECORD_BYTES], "little")
            start, stop, checksum = _FIELDS.unpack(fields)
            if checksum_bytes(fields) != check:
                continue
            if start < stop:
                new.append(StoredPart(start, stop, checksum))
            else:
                new = [each for each in new if each.stop <= stop or start <= each.start]
                self.parts = [each for each in self.parts if each.stop <= stop or start <= each.start]
        if new:
            self.parts = sorted({*self.parts, *new})
        self._num_read += len(data)

    def add_parts(self, parts: Iterable[StoredPart]) -> None:
        """Record parts whose bytes are on disk."""
        self._append([(each.start, each.stop, each.checksum) for each in parts])

    def drop_parts(self, parts: Iterable[StoredPart]) -> None:
        """Record that parts are not on disk after all, nor is any other that overlaps them."""
        self._append([(each.stop, each.start, 0) for each in parts])

    def forget_all(self) -> None:
        """Record that nothing is on disk."""
        os.ftruncate(self._descriptor, 0)
        self._num_read, self.parts = 0, []

    def find_parts(self, start: int, stop: int) -> Sequence[StoredPart]:
        """Return the parts that overlap ``[start, stop)``."""
        first = bisect.bisect_left(self.parts, StoredPart(start - PART_BYTES, 0, 0))
        last = bisect.bisect_left(self.parts, StoredPart(stop, 0, 0))
        return [each for each in self.parts[first:last] if each.stop > start]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _append(self, records: list[tuple[int, int, int]]) -> None:
        packed = [_FIELDS.pack(*each) for each in records]
        data = b"".join(each + checksum_bytes(each).to_bytes(8, "little") for each in packed)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            end = os.fstat(self._descriptor).st_size // _RECORD_BYTES * _RECORD_BYTES  # before a torn record
            while data:
                num_written = os.pwrite(self._descriptor, data, end)
                data, end = data[num_written:], end + num_written
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.read_new()

"""One file of a cache: a sparse copy of a checkpoint's file, and the record of which of its parts are whole.

Knows one folder and its locks; not what fills it, or how large all such folders may be together.
"""

from __future__ import annotations

import bisect
import fcntl
import itertools
import os
import time
from typing import TYPE_CHECKING

from lingualinked.model.weight_files.byte_ranges import (
    ByteRange,
    checksum_bytes,
    cut_ranges,
    subtract_ranges,
)
from lingualinked.model.weight_files.part_journal import PartJournal, StoredPart

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

DATA, JOURNAL, LOCK, CLAIMS = "data", "parts", "lock", "claims"
_COMMIT_BYTES, _COMMIT_S = 32 << 20, 2.0
"""After so many bytes or seconds what was written is recorded, which waits for the disk; a killed process loses no more."""


class DamagedPartsError(Exception):
    """Bytes on disk are not what was written there, or not on record; now they are not on record any more."""


class CachedFile:
    """The parts of one file that are on this disk; it can't be removed from the cache until it is closed.

    Several processes may fill it at once: each claims what it is about to write, and the kernel frees the claims of one that
    dies. A part is recorded after its bytes have reached the disk, so that no crash leaves a record without its bytes.
    """

    def __init__(self, folder: Path, num_bytes: int, header_bytes: int) -> None:
        self.folder = folder
        self.num_bytes = num_bytes
        self._lock = _open_shared(folder)
        self._claims: int | None = None  # opened by who writes: closing it anywhere frees all claims of the process
        self._data: int | None = None
        self._journal = PartJournal(folder / JOURNAL)
        self._boundaries = [header_bytes]
        self._written: list[StoredPart] = []
        self._written_bytes, self._committed_s = 0, time.monotonic()
        try:
            data = self._open_data()
            if os.fstat(data).st_size != num_bytes:  # new, or no longer what the record is about
                self._journal.forget_all()
                os.ftruncate(data, num_bytes)
            self._journal.read_new()
            os.utime(folder / LOCK)  # when it was last used
        except BaseException:
            self.close()
            raise
        self.close_data()

    def set_boundaries(self, boundaries: Iterable[int]) -> None:
        """Let no part lie across these offsets, so that tensors can be checked by themselves."""
        self._boundaries = sorted({*self._boundaries, *boundaries})

    def held(self, file: int) -> tuple[ByteRange, ...]:
        """Return what all processes have recorded, as ranges of a file of this index."""
        self._journal.read_new()
        return tuple(ByteRange(file, each.start, each.stop) for each in self._journal.held)

    def allocated_bytes(self) -> int:
        """Return the bytes of disk that the copy takes up."""
        return os.fstat(self._open_data()).st_blocks * 512

    def reserve(self, ranges: Iterable[ByteRange]) -> None:
        """Take up the disk space of ranges; raises OSError if there is too little."""
        data = self._open_data()
        for each in ranges:
            os.posix_fallocate(data, each.start, each.num_bytes)

    def claim(self, part: ByteRange) -> bool:
        """Claim a range for writing; return False if another process has claimed some of it."""
        if self._claims is None:
            self._claims = _open(self.folder / CLAIMS)
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, part.num_bytes, part.start)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self, part: ByteRange) -> None:
        """Release a claim."""
        assert self._claims is not None
        fcntl.lockf(self._claims, fcntl.LOCK_UN, part.num_bytes, part.start)

    def write(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes of a claimed range; they count once they are recorded."""
        view = memoryview(data)
        for part in cut_ranges(self._between_boundaries(start, start + len(view))):
            piece = view[part.start - start : part.stop - start]
            self._written.append(StoredPart(part.start, part.stop, checksum_bytes(piece)))
        target = self._open_data()
        while view:
            num_written = os.pwrite(target, view, start)
            view, start = view[num_written:], start + num_written
        self._written_bytes += len(data)
        if self._written_bytes >= _COMMIT_BYTES or time.monotonic() >= self._committed_s + _COMMIT_S:
            self.commit()

    def commit(self) -> None:
        """Record what was written, after the disk has it."""
        written, self._written, self._written_bytes = self._written, [], 0
        if written:
            os.fdatasync(self._open_data())
            self._journal.add_parts(written)
        self._committed_s = time.monotonic()

    def read_into(self, start: int, target: memoryview) -> None:
        """Read the bytes from `start` on that fill `target`, and check them.

        Raises DamagedPartsError if some are not on record, or the disk has lost or changed them.
        """
        stop = start + len(target)
        parts = self._journal.find_parts(start, stop)
        if subtract_ranges([ByteRange(0, start, stop)], (ByteRange(0, each.start, each.stop) for each in parts)):
            raise DamagedPartsError
        first = min([start, *(each.start for each in parts)])
        last = max([stop, *(each.stop for each in parts)])
        # Parts end where tensors do, so that this is a copy only when something else is read.
        view = target if (first, last) == (start, stop) else memoryview(bytearray(last - first))
        damaged = []
        for part in parts:  # one by one: what is in the processor's cache is checked at 59 GiB/s, what is not at 22
            piece = view[part.start - first : part.stop - first]
            if not self._read_piece(part.start, piece) or checksum_bytes(piece) != part.checksum:
                damaged.append(part)
        if damaged:
            self._drop(damaged)
        if view is not target:
            target[:] = view[start - first : stop - first]

    def drop_range(self, start: int, stop: int) -> None:
        """Record that no part that overlaps ``[start, stop)`` is of use."""
        self._journal.drop_parts(self._journal.find_parts(start, stop))

    def free_if_empty(self) -> None:
        """Free the disk space of a copy of which nothing is recorded, unless another process is filling it."""
        whole = ByteRange(0, 0, 0)  # no length: to the end of the file
        if self.claim(whole):
            if not self.held(0):
                os.ftruncate(self._open_data(), 0)
                os.ftruncate(self._open_data(), self.num_bytes)
            self.release(whole)

    def close_data(self) -> None:
        """Close what is opened again when it is used: a model may have more files than a process may open."""
        for descriptor in (self._data, self._claims):
            if descriptor is not None:
                os.close(descriptor)
        self._data = self._claims = None

    def close(self) -> None:
        """Close the file; what was written and not recorded is fetched again."""
        self.close_data()
        os.close(self._lock)

    def _read_piece(self, start: int, target: memoryview) -> bool:
        """Fill `target` with the bytes from `start` on; return False if the file ends before."""
        data = self._open_data()
        while target:
            num_read = os.preadv(data, [target], start)
            if not num_read:
                return False
            target, start = target[num_read:], start + num_read
        return True

    def _open_data(self) -> int:
        if self._data is None:
            self._data = _open(self.folder / DATA)
        return self._data

    def _between_boundaries(self, start: int, stop: int) -> list[ByteRange]:
        first = bisect.bisect_right(self._boundaries, start)
        last = bisect.bisect_left(self._boundaries, stop)
        edges = [start, *self._boundaries[first:last], stop]
        return [ByteRange(0, edge, after) for edge, after in itertools.pairwise(edges)]

    def _drop(self, parts: Sequence[StoredPart]) -> None:
        self._journal.drop_parts(parts)
        raise DamagedPartsError


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _open_shared(folder: Path) -> int:
    """Open a folder's lock, shared, and make the folder if necessary; whoever removes it holds the lock exclusively."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            lock = _open(folder / LOCK)
        except FileNotFoundError:  # removed since it was made
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)

"""Fills cached files with fetched bytes, beside other processes that fill the same ones.

Knows claims and fetchers; not how much is to be fetched, or why.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from lingualinked.model.weight_files.byte_ranges import ByteRange, cut_ranges, num_bytes_of, subtract_ranges
from lingualinked.model.weight_files.fetching import FetchError
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lingualinked.model.weight_files.cached_file import CachedFile
    from lingualinked.model.weight_files.fetching import Fetcher

# Claimed and fetched at once: large beside what is on its way, small beside what others wait for.
_BATCH_BYTES = 64 << 20
_CLAIM_BYTES = 8 << 20
_WAIT_S = 0.05


def fill_files(files: Mapping[int, CachedFile], missing: Sequence[ByteRange], fetcher: Fetcher) -> None:
    """Fetch ranges into cached files, by their index, and wait for those that another process is fetching.

    What has arrived is recorded, whatever happens afterwards.

    Raises
    ------
    FetchError
        If the fetcher raises it, or delivers something else than was requested.
    OSError
        If the disk is full or fails.
    """
    waiting = deque(_batches(missing))
    num_refused = 0
    while waiting:
        # 1) claim a batch
        fetcher.check_cancelled()
        batch = waiting.popleft()
        claimed = [part for part in batch if files[part.file].claim(part)]
        try:
            # 2) fetch what nobody has recorded meanwhile
            left = subtract_ranges(claimed, _held(files, claimed))
            if left:
                _fetch(files, left, fetcher)
        finally:
            for part in claimed:
                files[part.file].release(part)
        # 3) return to what others have claimed, once nothing else is left
        refused = subtract_ranges(batch, claimed)
        if refused:
            waiting.append(list(cut_ranges(refused, _CLAIM_BYTES)))
        num_refused = 0 if claimed else num_refused + 1
        if num_refused and num_refused >= len(waiting):
            time.sleep(_WAIT_S)


def _fetch(files: Mapping[int, CachedFile], ranges: Sequence[ByteRange], fetcher: Fetcher) -> None:
    """Fetch claimed ranges, and record what arrives."""

    def deliver(part: ByteRange, data: bytes | bytearray | memoryview) -> None:
        if len(data) != part.num_bytes or not any(each.covers(part) for each in ranges):
            raise FetchError(f"a source sent {count_text(len(data), 'byte')} as {part}, which was not requested")
        files[part.file].write(part.start, data)

    try:
        fetcher.fetch(ranges, deliver)
    finally:
        for index in {each.file for each in ranges}:
            files[index].commit()
    missing = subtract_ranges(ranges, _held(files, ranges))
    if missing:
        raise FetchError(
            f"{count_text(num_bytes_of(missing), 'byte')} of {num_bytes_of(ranges):,} requested ones did not arrive"
        )


def _held(files: Mapping[int, CachedFile], ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """Return what is on record now of the files that ranges are of."""
    return [each for index in {each.file for each in ranges} for each in files[index].held(index)]


def _batches(missing: Iterable[ByteRange]) -> list[list[ByteRange]]:
    """Group ranges, cut into what is claimed at once, into batches."""
    batches: list[list[ByteRange]] = [[]]
    for part in cut_ranges(missing, _CLAIM_BYTES):
        if batches[-1] and num_bytes_of(batches[-1]) + part.num_bytes > _BATCH_BYTES:
            batches.append([])
        batches[-1].append(part)
    return batches

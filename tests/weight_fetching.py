"""A process that fills a weight cache with bytes that everybody can compute; imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lingualinked.model.spec import FileContent
from lingualinked.model.weight_files import cached_file
from lingualinked.model.weight_files.byte_ranges import ByteRange, cut_ranges, subtract_ranges
from lingualinked.model.weight_files.fetching import DeliverPart
from lingualinked.model.weight_files.filling import fill_files
from lingualinked.model.weight_files.weight_cache import WeightCache

SIZE = 20_000_000 + 123
PART = 10_000
_BLOCK = 4096
CONTENT = FileContent(name="m.safetensors", num_bytes=SIZE, header_bytes=777, header_digest="", fingerprint="0" * 32)


def byte_block(start: int, stop: int) -> bytes:
    """Return bytes of the file, which differ from place to place."""
    first, last = start // _BLOCK, -(-stop // _BLOCK)
    data = b"".join(hashlib.shake_128(number.to_bytes(8, "little")).digest(_BLOCK) for number in range(first, last))
    return data[start - _BLOCK * first : stop - _BLOCK * first]


class _Source:
    """Delivers what is requested, with a pause after each part."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s, self.num_bytes = pause_s, 0

    def fetch(self, ranges: Sequence[ByteRange], deliver: DeliverPart) -> None:
        for part in cut_ranges(ranges, PART):
            time.sleep(self.pause_s)
            deliver(part, byte_block(part.start, part.stop))
            self.num_bytes += part.num_bytes

    def check_cancelled(self) -> None:
        pass


def fill(folder: str, pause_s: float, max_bytes: int) -> None:
    """Fill the cache with the whole file; print the bytes that were fetched."""
    cached_file._COMMIT_BYTES = 300_000  # so that a killed process has recorded something before
    cache, source = WeightCache(Path(folder), max_bytes), _Source(pause_s)
    with contextlib.closing(cache.open_file(CONTENT, "model")) as file:
        missing = subtract_ranges([ByteRange(0, 0, SIZE)], file.held(0))
        cache.reserve([(file, missing)])
        sys.stdout.write("fetching\n")
        sys.stdout.flush()
        fill_files({0: file}, missing, source)
    sys.stdout.write(f"{source.num_bytes}\n")

"""What one party may fetch of files, and how many parts may be on their way to it; reads such a part.

Knows ranges and receipts; no messages, and not where the bytes lie.
"""

from __future__ import annotations

import bisect
import secrets
from collections.abc import Iterable

from lingualinked.errors import ProtocolError
from lingualinked.model.weight_files.byte_ranges import PART_BYTES, ByteRange, merge_ranges
from lingualinked.quantities import count_text

MAX_PARTS_IN_FLIGHT = 4
"""Parts that one party may have requested of another and not received: this many MiB are all that it can make wait there."""

_BEHIND_ALL = 1 << 64


class SharedParts:
    """The ranges of files that one party may fetch, with the receipts of the parts that it has not confirmed."""

    def __init__(self, ranges: Iterable[ByteRange]) -> None:
        self._ranges = merge_ranges(ranges)
        self._unconfirmed: set[int] = set()

    def admit(self, part: ByteRange, receipt: int) -> int:
        """Return the receipt to send with a part that is requested.

        Raises ProtocolError if the part is not among the ranges, or too many have been requested and not received.
        """
        self._unconfirmed.discard(receipt)
        place = bisect.bisect_right(self._ranges, ByteRange(part.file, part.start, _BEHIND_ALL)) - 1
        if place < 0 or not self._ranges[place].covers(part) or part.num_bytes <= 0:
            raise ProtocolError(
                f"bytes [{part.start}, {part.stop}) of file {part.file} were requested, which belong to no tensor of the "
                "layers that the worker is to load"
            )
        if part.num_bytes > PART_BYTES:
            raise ProtocolError(
                f"{count_text(part.num_bytes, 'byte')} were requested at once: the limit is {PART_BYTES}"
            )
        if len(self._unconfirmed) >= MAX_PARTS_IN_FLIGHT:
            raise ProtocolError(
                f"a part was requested before one of the {MAX_PARTS_IN_FLIGHT} before it had been received"
            )
        new = 1 + secrets.randbits(62)
        self._unconfirmed.add(new)
        return new

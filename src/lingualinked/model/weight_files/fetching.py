"""What the files of weights want of those who fetch bytes of them, and offer to those who serve bytes of them.

Interfaces and an error; fetches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lingualinked.errors import CheckpointError
from lingualinked.model.weight_files.byte_ranges import ByteRange

DeliverPart = Callable[[ByteRange, bytes | bytearray | memoryview], None]
"""Writes a part that has arrived. Any part of a requested range, in any order, of any length; the data are copied."""


class FetchError(CheckpointError):
    """No source has bytes that are missing here."""


class Fetcher(Protocol):
    """Fetches bytes of a checkpoint's files from wherever they are; used by one loading thread."""

    def fetch(self, ranges: Sequence[ByteRange], deliver: DeliverPart) -> None:
        """Fetch ranges, and call `deliver` in this thread with each part whose checksum is right.

        Returns once everything was delivered. Called several times in one load: for the files' headers, then for up to
        64 MiB at a time. What was delivered before an error is kept on disk and not fetched again.

        Raises
        ------
        FetchError
            If no source has the bytes.
        """

    def check_cancelled(self) -> None:
        """Raise an exception once the weights are no longer wanted; called while another process fetches the same bytes."""


class HeldFiles(Protocol):
    """The bytes of a checkpoint's files that this party has on disk and may serve; for one thread at a time."""

    @property
    def held(self) -> tuple[ByteRange, ...]:
        """What is held, merged; grows while a cache is being filled."""

    def read(self, part: ByteRange) -> bytes:
        """Read bytes of one file.

        Raises
        ------
        CheckpointError
            If the part is not held, or the file has changed or can't be read.
        """

    def close(self) -> None:
        """Close all files; a cache may remove them from then on."""

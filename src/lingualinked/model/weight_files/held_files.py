"""Serves bytes of a checkpoint's files that lie here as a whole.

Knows files; not who asks for their bytes, or whether they may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingualinked.errors import CheckpointError
from lingualinked.model.safetensors_file import SafetensorsFile
from lingualinked.model.weight_files.byte_ranges import ByteRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lingualinked.model.spec import CheckpointFile


class WholeFiles:
    """`HeldFiles` of a checkpoint whose files can be read here: the caller's, or a local copy of some of them.

    Raises CheckpointError if a file has changed since it was described, now or when it is read.
    """

    def __init__(self, files: Sequence[CheckpointFile | None]) -> None:
        self._files = [None if file is None else SafetensorsFile(file) for file in files]
        self.held = tuple(
            ByteRange(index, 0, file.num_bytes)
            for index, file in enumerate(files)
            if file is not None and file.num_bytes
        )

    def read(self, part: ByteRange) -> bytes:
        """Read bytes of one file; raise CheckpointError if it is not here or they can't be read."""
        if not any(each.covers(part) for each in self.held):
            raise CheckpointError(f"bytes {part.start:,} to {part.stop:,} of file {part.file} are not held here")
        file = self._files[part.file]
        assert file is not None
        data = bytearray(part.num_bytes)
        file.read_into(part.start, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            if file is not None:
                file.close()

"""Serves bytes of a checkpoint's files that lie here, as a whole or in a cache.

Knows files; not who asks for their bytes, or whether they may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingualinked.errors import CheckpointError
from lingualinked.model.weight_files.byte_ranges import ByteRange, subtract_ranges
from lingualinked.model.weight_files.cached_file import CachedFile, DamagedPartsError
from lingualinked.model.weights.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lingualinked.model.spec import CheckpointFile, ModelSpec
    from lingualinked.model.weight_files.weight_cache import WeightCache


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


class HeldWeights:
    """`HeldFiles` of a worker: the files of a model that lie here, and the parts of others in the cache."""

    def __init__(self, spec: ModelSpec, found: Sequence[CheckpointFile | None], cache: WeightCache | None) -> None:
        self._whole = WholeFiles(found)
        self._cached: dict[int, CachedFile] = {}
        try:
            for index, content in enumerate(spec.contents):
                cached = cache.find_file(content) if found[index] is None and cache is not None else None
                if cached is not None:
                    self._cached[index] = cached
        except BaseException:
            self.close()
            raise

    @property
    def held(self) -> tuple[ByteRange, ...]:
        """What is held now, merged."""
        cached = [each for index, file in self._cached.items() for each in file.held(index)]
        return tuple(sorted((*self._whole.held, *cached)))

    def read(self, part: ByteRange) -> bytes:
        """Read bytes of one file; raise CheckpointError if they are not held, or no longer what was written."""
        file = self._cached.get(part.file)
        if file is None:
            return self._whole.read(part)
        if subtract_ranges([part], file.held(part.file)):
            raise CheckpointError(
                f"bytes {part.start:,} to {part.stop:,} of file {part.file} are not in the cache here"
            )
        data = bytearray(part.num_bytes)
        try:
            file.read_into(part.start, memoryview(data))
        except DamagedPartsError as error:
            raise CheckpointError(f"bytes of {file.folder} are no longer what was written") from error
        return bytes(data)

    def close(self) -> None:
        """Close all files."""
        self._whole.close()
        for file in self._cached.values():
            file.close()

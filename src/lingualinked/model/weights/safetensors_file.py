"""Reads a safetensors file: its header, checked against its size, and single tensors, into aligned memory.

Knows the file format; no models, and not which file of a checkpoint holds which tensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lingualinked.errors import CheckpointError
from lingualinked.model.spec import CheckpointFile
from lingualinked.quantities import count_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from io import FileIO

DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's place in its file: bytes ``[start, stop)``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class FileChangedError(CheckpointError):
    """A file has changed since the checkpoint was first read, or can't be read here."""


def identify_file(path: str) -> CheckpointFile:
    """Describe a file as it is now; raise CheckpointError if it is missing, can't be read, or is a device or a pipe."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from error
    if not stat.S_ISREG(status.st_mode):  # to open it might block, or have effects
        raise CheckpointError(_unreadable(path, OSError("it is not a regular file")))
    return _identity(path, status)


class SafetensorsFile:
    """A safetensors file, whose header is read and checked, and whose tensors are read on request.

    Raises FileChangedError if it has been replaced or written to since ``file`` was made, now or when a tensor is read.
    """

    def __init__(self, file: CheckpointFile) -> None:
        self.path = file.path
        self._expected = file
        self._file: FileIO | None = None
        try:
            with self._unchanged() as opened:
                self.header_bytes = header_size(self.path, opened.read(8), file.num_bytes)
                header = opened.read(self.header_bytes - 8)
        finally:
            self.close()  # a checkpoint may have more files than a process may open
        self.entries = parse_header(self.path, header, file.num_bytes)

    def read_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into new, aligned memory, without a second copy and without mapping the file."""
        entry = self.entries[name]
        tensor, target = empty_tensor(entry)
        self.read_into(entry.start, target)
        return tensor

    def read_into(self, start: int, target: memoryview) -> None:
        """Read the bytes from `start` on that fill `target`; raise CheckpointError if the file ends before."""
        with self._unchanged() as opened:
            opened.seek(start)
            while target:
                num_read = opened.readinto(target)
                if not num_read:
                    raise damaged(self.path, f"it ends before byte {start + target.nbytes:,}")
                start += num_read
                target = target[num_read:]

    def read_pieces(self, places: Iterable[tuple[int, int]]) -> bytes:
        """Read many small pieces, each from a start to a stop, into one string."""
        with self._unchanged() as opened:
            descriptor = opened.fileno()
            return b"".join(os.pread(descriptor, stop - start, start) for start, stop in places)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[FileIO]:
        """Open the file if necessary; raise FileChangedError if it has changed, on entry or on exit."""
        try:
            if self._file is None:
                self._file = Path(self.path).open("rb", buffering=0)  # noqa: SIM115 - closed by close()
            self._check_unchanged(self._file)
            try:
                yield self._file
            except CheckpointError:
                self._check_unchanged(self._file)  # a file that was replaced is not a damaged one
                raise
            self._check_unchanged(self._file)
        except OSError as error:
            raise FileChangedError(_unreadable(self.path, error)) from error

    def _check_unchanged(self, opened: FileIO) -> None:
        if _identity(self.path, os.fstat(opened.fileno())) != self._expected:
            raise FileChangedError(
                f"{self.path} has been replaced or written to since the checkpoint was first read, so that its weights "
                "may be of another model: load the model again once nothing writes to this file"
            )

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def empty_tensor(entry: TensorEntry) -> tuple[torch.Tensor, memoryview]:
    """Make a tensor in new, aligned memory, and return it with its bytes, which are to be filled."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return tensor, memoryview(values)


def header_size(path: str, beginning: bytes, num_bytes: int) -> int:
    """Return the size of a header, with the 8 bytes of its length, from the beginning of a file of `num_bytes`."""
    header_length = int.from_bytes(beginning[:8], "little")
    if num_bytes < 8 or header_length > min(num_bytes - 8, _MAX_HEADER_BYTES):
        raise damaged(path, f"its header claims {count_text(header_length, 'byte')}, the file has {num_bytes:,}")
    return 8 + header_length


def parse_header(path: str, header: bytes, num_bytes: int) -> dict[str, TensorEntry]:
    """Return the tensors of a file of `num_bytes`, by name, in the order of its header (without its length)."""
    header_bytes = 8 + len(header)
    try:
        fields: dict[str, Any] = json.loads(header)
        fields.pop("__metadata__", None)
        entries = {name: _entry(path, name, each, header_bytes) for name, each in fields.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, f"its header is malformed ({error!r})") from error
    expected_bytes = max((entry.stop for entry in entries.values()), default=header_bytes)
    if expected_bytes != num_bytes:
        raise damaged(path, f"it has {count_text(num_bytes, 'byte')} where its header announces {expected_bytes:,}")
    return entries


def _entry(path: str, name: str, fields: dict[str, Any], header_bytes: int) -> TensorEntry:
    if fields["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{name} in {path} has the dtype {fields['dtype']}, which is not supported: "
            f"convert the checkpoint to one of {', '.join(sorted(DTYPES))}"
        )
    begin, end = fields["data_offsets"]
    entry = TensorEntry(
        dtype=DTYPES[fields["dtype"]],
        shape=tuple(fields["shape"]),
        start=header_bytes + begin,
        stop=header_bytes + end,
    )
    if begin < 0 or end - begin != math.prod(entry.shape) * entry.dtype.itemsize:
        raise ValueError(f"{name} of shape {entry.shape} can't take up bytes {begin} to {end}")
    return entry


def damaged(path: str, cause: str) -> CheckpointError:
    """Make the error for a file that is not what its header says."""
    return CheckpointError(f"{path} is truncated or not a safetensors file: {cause}; copy or download it again")


def _unreadable(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing: copy or download the whole checkpoint again, every shard of it"
    return f"{path} can't be read ({error}): check the path and its permissions"


def _identity(path: str, status: os.stat_result) -> CheckpointFile:
    return CheckpointFile(
        path=str(Path(path).absolute()),
        device=status.st_dev,
        inode=status.st_ino,
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
    )

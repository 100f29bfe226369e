"""The cache of fetched weights on this disk: bounded in size, shared by all workers of a user.

Knows folders of files by their owners and fingerprints; not which model needs which bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import operator
import os
import secrets
import shutil
import socket
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lingualinked.disk_cache import cache_folder
from lingualinked.errors import CheckpointError, ResourceError
from lingualinked.model.weight_files.byte_ranges import ByteRange, num_bytes_of
from lingualinked.model.weight_files.cached_file import JOURNAL, LOCK, CachedFile
from lingualinked.model.weight_files.part_journal import PartJournal
from lingualinked.quantities import bytes_text
from lingualinked.whole_file import write_whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lingualinked.model.spec import FileContent

DEFAULT_CACHE_BYTES = 20 << 30
_ABOUT, _REMOVED = "about.json", "removed-"
_BOUND = "--cache-bytes"  # a daemon's option
_NO_CACHE = f"{_BOUND} 0"
_NAME_LENGTH = 32  # of a folder, and a fingerprint's digits
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _About(msgspec.Struct, frozen=True):
    """What a cached file was called where it came from."""

    model: str
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """A file in the cache."""

    folder: str  # its name in the cache
    model: str  # the name of its folder where it came from
    name: str
    num_bytes: int  # of the whole file
    held_bytes: int  # of it, that are here
    disk_bytes: int
    last_used_s: float  # seconds since the epoch


def default_cache_folder() -> Path:
    """Return the folder for weights below the user's cache folder; raise ResourceError if the user has none."""
    folder = cache_folder()
    if folder is None:
        raise ResourceError("there is no folder for weights: the user has no home folder; set XDG_CACHE_HOME")
    return folder / "weights"


class WeightCache:
    """Copies of checkpoint files that may take up `max_bytes` of disk together.

    A fingerprint is of a sample of a file's bytes, and whoever fetches a file decides what the others are. What one
    `owner` has fetched is therefore not given to another one, who has a copy of its own.
    """

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_CACHE_BYTES, owner: str = "") -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._owner = owner

    def open_file(self, content: FileContent, model: str) -> CachedFile:
        """Open the copy of a file, or begin one; raise ResourceError if the disk does not allow it."""
        folder = self._folder_of(content)
        with self.disk_errors(content.header_bytes):
            file = CachedFile(folder, content.num_bytes, content.header_bytes)
            with contextlib.ExitStack() as undo:
                undo.callback(file.close)
                if not (folder / _ABOUT).exists():
                    about = _About(model=model, name=content.name, num_bytes=content.num_bytes)
                    write_whole_file(folder / _ABOUT, msgspec.json.encode(about).decode(), mode=0o600)
                undo.pop_all()
        return file

    def find_file(self, content: FileContent) -> CachedFile | None:
        """Open the copy of a file if there is one."""
        folder = self._folder_of(content)
        with contextlib.suppress(OSError):
            return CachedFile(folder, content.num_bytes, content.header_bytes) if folder.exists() else None
        return None

    def reserve(self, missing: Sequence[tuple[CachedFile, Sequence[ByteRange]]]) -> None:
        """Take up the disk space for what is missing of open files, and remove the files that were not used for longest.

        Raises
        ------
        ResourceError
            If the cache or the disk is too small, even without all that is not in use.
        """
        needed = sum(num_bytes_of(ranges) for _, ranges in missing)
        with self.disk_errors(needed), self._exclusive():
            try:
                # 1) make room; what a killed process had reserved of these files need not be reserved again
                reserved = sum(max(0, file.allocated_bytes() - num_bytes_of(file.held(0))) for file, _ in missing)
                self._make_room(max(0, needed - reserved), needed)
                # 2) take it, so that a full disk shows before anything is fetched, and other processes count with it
                for file, ranges in missing:
                    self._reserve(file, ranges)
                self._make_room(0, needed)
            except BaseException:
                for file, _ in missing:
                    file.free_if_empty()
                raise

    def entries(self) -> list[CacheEntry]:
        """List the files in the cache, the last used first."""
        found = [entry for folder in self._folders() if (entry := _describe(folder)) is not None]
        return sorted(found, key=operator.attrgetter("last_used_s"), reverse=True)

    def clear(self) -> int:
        """Remove every file that no process uses; return the bytes of disk that this frees."""
        with self._exclusive():
            before = self.disk_bytes()
            for folder in self._folders():
                _remove(folder)
            return before - self.disk_bytes()

    def disk_bytes(self) -> int:
        """Return the bytes of disk that all files take up."""
        return sum(_disk_bytes(folder) for folder in self._folders())

    @contextlib.contextmanager
    def disk_errors(self, needed: int) -> Iterator[None]:
        """Raise errors of the disk as ResourceError; `needed` is the number of bytes that were to be written."""
        try:
            yield
        except OSError as error:
            host = f"{self.folder} on host {socket.gethostname()!r}"
            if error.errno not in _FULL:
                raise ResourceError(
                    f"weights can't be kept in {host} ({error}): check the folder, set XDG_CACHE_HOME to another one, or "
                    f"load weights without a cache ({_NO_CACHE})"
                ) from error
            free = shutil.disk_usage(_existing(self.folder)).free
            raise ResourceError(
                f"the disk of {host} is full: {bytes_text(needed)} of weights are to be kept there and {bytes_text(free)} "
                f"are free, {bytes_text(max(0, needed - free), round_up=True)} too few: free disk space, set XDG_CACHE_HOME "
                f"to a folder on a larger disk, or load weights without a cache ({_NO_CACHE})"
            ) from error

    def _folder_of(self, content: FileContent) -> Path:
        name = content.fingerprint
        if len(name) != _NAME_LENGTH or not set(name) <= set(string.hexdigits.lower()):
            raise CheckpointError(f"{name!r} is not the fingerprint of a file: it can't be trusted")
        if self._owner:
            name = hashlib.blake2b(f"{self._owner} {name}".encode(), digest_size=_NAME_LENGTH // 2).hexdigest()
        return self.folder / name

    def _folders(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return [each for each in self.folder.iterdir() if len(each.name) == _NAME_LENGTH and each.is_dir()]
        return []

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Let no other process make room at the same time; remove what one that was killed meanwhile has left."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob(f"{_REMOVED}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            os.close(lock)

    def _make_room(self, needed: int, total: int) -> None:
        while (used := self.disk_bytes()) + needed > self.max_bytes:
            if not self._remove_oldest():
                raise ResourceError(
                    f"the cache of weights in {self.folder} on host {socket.gethostname()!r} may take up "
                    f"{bytes_text(self.max_bytes)} ({_BOUND}), too little for {bytes_text(total)} beside "
                    f"{bytes_text(used)} in use: raise {_BOUND} to {bytes_text(used + needed, round_up=True)}, or load "
                    f"weights without a cache ({_NO_CACHE})"
                )

    def _reserve(self, file: CachedFile, ranges: Sequence[ByteRange]) -> None:
        while True:
            try:
                return file.reserve(ranges)
            except OSError as error:
                if error.errno not in _FULL or not self._remove_oldest():
                    raise

    def _remove_oldest(self) -> bool:
        """Remove the file that was not used for longest, of those that no process uses; return whether there was one."""
        return any(_remove(folder) for folder in sorted(self._folders(), key=_last_used_s))


def _remove(folder: Path) -> bool:
    """Remove a folder unless a process uses it; renamed first, so that it is there as a whole or not at all."""
    with contextlib.suppress(OSError):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed = folder.rename(folder.with_name(f"{_REMOVED}{secrets.token_hex(8)}"))
        finally:
            os.close(lock)
        shutil.rmtree(removed, ignore_errors=True)
        return True
    return False


def _last_used_s(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / LOCK).stat().st_mtime
    return 0.0


def _disk_bytes(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(each.stat().st_blocks * 512 for each in folder.iterdir())
    return 0


def _describe(folder: Path) -> CacheEntry | None:
    try:
        about = msgspec.json.decode((folder / _ABOUT).read_bytes(), type=_About)
        journal = PartJournal(folder / JOURNAL)
        journal.read_new()
    except (OSError, msgspec.DecodeError):
        return None
    return CacheEntry(
        folder=folder.name,
        model=about.model,
        name=about.name,
        num_bytes=about.num_bytes,
        held_bytes=num_bytes_of(journal.held),
        disk_bytes=_disk_bytes(folder),
        last_used_s=_last_used_s(folder),
    )


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())

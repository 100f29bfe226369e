"""A sparse copy holds what was written and committed, and notices what the disk has changed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from lingualinked.model.weight_files.byte_ranges import PART_BYTES, ByteRange, merge_ranges, subtract_ranges
from lingualinked.model.weight_files.cached_file import CachedFile, DamagedPartsError

SIZE = 3 * PART_BYTES + 100
CONTENT = os.urandom(SIZE)
WRITTEN = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda t: ByteRange(0, t[0], min(SIZE, sum(t)))),
    max_size=5,
)


@contextlib.contextmanager
def cached_file(folder: Path | None = None) -> Iterator[CachedFile]:
    with (
        tempfile.TemporaryDirectory() as own,
        contextlib.closing(CachedFile(folder or Path(own) / "f", SIZE, 50)) as file,
    ):
        yield file


def write(file: CachedFile, start: int, stop: int) -> None:
    file.write(start, CONTENT[start:stop])
    file.commit()


def read(file: CachedFile, start: int, stop: int) -> bytes:
    data = bytearray(stop - start)
    file.read_into(start, memoryview(data))
    return bytes(data)


@settings(max_examples=25, deadline=None)
@given(WRITTEN, st.lists(st.integers(0, SIZE), max_size=5), st.integers(0, SIZE - 1), st.integers(1, SIZE))
def test_what_was_written_is_read_and_nothing_else(
    written: list[ByteRange], boundaries: list[int], start: int, length: int
) -> None:
    wanted = ByteRange(0, start, min(SIZE, start + length))
    with cached_file() as file:
        file.set_boundaries(boundaries)
        for each in written:
            write(file, each.start, each.stop)
        assert file.held(0) == merge_ranges(written)
        if subtract_ranges([wanted], written):
            with pytest.raises(DamagedPartsError):
                read(file, wanted.start, wanted.stop)
        else:
            assert read(file, wanted.start, wanted.stop) == CONTENT[wanted.start : wanted.stop]
        with cached_file(file.folder) as other:  # another process
            assert other.held(0) == merge_ranges(written)


def test_what_was_not_committed_does_not_count(tmp_path: Path) -> None:
    with cached_file(tmp_path) as file:
        file.write(0, CONTENT[:1000])
        assert file.held(0) == ()
    with cached_file(tmp_path) as file:
        assert file.held(0) == ()


@pytest.mark.parametrize("position", [0, 49, 50, 1000, PART_BYTES, SIZE - 1])
def test_a_flipped_bit_on_disk_is_noticed_and_only_its_part_fetched_again(position: int, tmp_path: Path) -> None:
    with cached_file(tmp_path) as file:
        write(file, 0, SIZE)
        with (tmp_path / "data").open("r+b") as data:
            data.seek(position)
            data.write(bytes([CONTENT[position] ^ 1]))
        with pytest.raises(DamagedPartsError):
            read(file, position, position + 1)
        (missing,) = subtract_ranges([ByteRange(0, 0, SIZE)], file.held(0))
        assert missing.start <= position < missing.stop
        assert missing.num_bytes <= PART_BYTES
        write(file, missing.start, missing.stop)
        assert read(file, 0, SIZE) == CONTENT


def test_data_that_was_removed_or_replaced_is_not_on_record(tmp_path: Path) -> None:
    with cached_file(tmp_path) as file:
        write(file, 0, SIZE)
    (tmp_path / "data").unlink()
    with cached_file(tmp_path) as file:
        assert file.held(0) == ()
        write(file, 0, 100)
    os.truncate(tmp_path / "data", 60)
    with cached_file(tmp_path) as file:
        assert file.held(0) == ()


def test_a_copy_takes_up_the_disk_space_of_its_parts_alone(tmp_path: Path) -> None:
    with cached_file(tmp_path) as file:
        assert file.allocated_bytes() == 0
        file.reserve([ByteRange(0, PART_BYTES, 2 * PART_BYTES)])
        assert PART_BYTES <= file.allocated_bytes() < 2 * PART_BYTES
        write(file, PART_BYTES, 2 * PART_BYTES)
        assert PART_BYTES <= file.allocated_bytes() < 2 * PART_BYTES
        file.free_if_empty()
        assert file.allocated_bytes() >= PART_BYTES
    with cached_file(tmp_path / "empty") as file:
        file.reserve([ByteRange(0, 0, PART_BYTES)])
        file.free_if_empty()
        assert file.allocated_bytes() == 0

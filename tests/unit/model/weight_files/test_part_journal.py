"""The record of parts: what is read is what was added and not dropped, whatever a crash leaves at its end."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from lingualinked.model.weight_files.byte_ranges import ByteRange, merge_ranges
from lingualinked.model.weight_files.part_journal import PartJournal, StoredPart

PARTS = st.tuples(st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**64 - 1)).map(
    lambda t: StoredPart(t[0], t[0] + t[1], t[2])
)
ACTIONS = st.lists(st.tuples(st.sampled_from(["add", "drop"]), st.lists(PARTS, max_size=4)), max_size=8)


@contextlib.contextmanager
def journal() -> Iterator[PartJournal]:
    with tempfile.TemporaryDirectory() as folder:
        yield PartJournal(Path(folder) / "parts")


def reopened(opened: PartJournal) -> list[StoredPart]:
    other = PartJournal(opened._path)
    other.read_new()
    assert other.held == merge_ranges(ByteRange(0, each.start, each.stop) for each in other.parts)
    return other.parts


@given(ACTIONS)
def test_parts_are_those_added_and_not_dropped_since(actions: list[tuple[str, list[StoredPart]]]) -> None:
    expected: set[StoredPart] = set()
    with journal() as opened:
        for action, parts in actions:
            if action == "add":
                opened.add_parts(parts)
                expected |= set(parts)
            else:
                opened.drop_parts(parts)
                for part in parts:
                    expected = {each for each in expected if each.stop <= part.start or part.stop <= each.start}
        assert opened.parts == sorted(expected) == reopened(opened)
        assert opened.held == merge_ranges(ByteRange(0, each.start, each.stop) for each in expected)
        for part in expected:
            assert part in opened.find_parts(part.start, part.start + 1)
            assert part not in opened.find_parts(part.stop, part.stop + 1)


@given(st.integers(1, 31), st.binary(max_size=31))
def test_a_torn_record_is_ignored_and_overwritten(num_kept: int, garbage: bytes) -> None:
    first, second, third = (StoredPart(start, start + 5, start) for start in (0, 5, 10))
    with journal() as opened:
        opened.add_parts([first, second])
        os.truncate(opened._path, 32 + num_kept)  # the crash was within the second record
        assert reopened(opened) == [first]
        overwrite(opened._path, 32, garbage)
        assert reopened(opened) == [first]
        opened.add_parts([third])
        assert reopened(opened) == [first, third]


@pytest.mark.parametrize("position", range(32))
def test_a_damaged_record_is_ignored(position: int) -> None:
    first, second = StoredPart(0, 5, 1), StoredPart(5, 10, 2)
    with journal() as opened:
        opened.add_parts([first, second])
        byte = opened._path.read_bytes()[position]
        overwrite(opened._path, position, bytes([byte ^ 64]))
        assert reopened(opened) == [second]


def test_what_another_process_forgets_is_forgotten() -> None:
    with journal() as opened:
        opened.add_parts([StoredPart(0, 5, 1), StoredPart(5, 9, 1)])
        other = PartJournal(opened._path)
        other.read_new()
        opened.forget_all()
        opened.add_parts([StoredPart(7, 9, 3)])
        other.read_new()
        assert other.parts == [StoredPart(7, 9, 3)]


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)

"""Ranges of bytes, against sets of bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given, strategies as st

from lingualinked.model.weight_files.byte_ranges import (
    ByteRange,
    checksum_bytes,
    cut_ranges,
    intersect_ranges,
    merge_ranges,
    num_bytes_of,
    subtract_ranges,
)

RANGES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 8)).map(
        lambda t: ByteRange(t[0], t[1], t[1] + t[2])
    ),
    max_size=12,
)


def as_set(ranges: Iterable[ByteRange]) -> set[tuple[int, int]]:
    return {(each.file, byte) for each in ranges for byte in range(each.start, each.stop)}


def is_merged(ranges: tuple[ByteRange, ...]) -> bool:
    pairs = itertools.pairwise(ranges)
    return all(first.file < second.file or first.stop < second.start for first, second in pairs)


@given(RANGES)
def test_merged_ranges_have_the_same_bytes_without_overlap(ranges: list[ByteRange]) -> None:
    merged = merge_ranges(ranges)
    assert as_set(merged) == as_set(ranges)
    assert is_merged(merged)
    assert num_bytes_of(merged) == len(as_set(ranges))


@given(RANGES, RANGES)
def test_what_is_left_is_the_difference(ranges: list[ByteRange], held: list[ByteRange]) -> None:
    left = subtract_ranges(ranges, held)
    assert as_set(left) == as_set(ranges) - as_set(held)
    assert is_merged(left)


@given(RANGES, RANGES)
def test_what_both_have_is_the_intersection(ranges: list[ByteRange], others: list[ByteRange]) -> None:
    both = intersect_ranges(ranges, others)
    assert as_set(both) == as_set(ranges) & as_set(others)
    assert is_merged(both)


def test_ranges_in_very_many_pieces_are_subtracted_in_one_pass() -> None:
    pieces = [ByteRange(0, 2 * start, 2 * start + 1) for start in range(50_000)]
    between = subtract_ranges([ByteRange(0, 0, 100_000)], pieces)
    assert len(between) == 50_000
    assert subtract_ranges(between, pieces) == between  # each with each would take an hour


@given(RANGES, st.integers(1, 9))
def test_parts_end_at_multiples_of_their_size(ranges: list[ByteRange], size: int) -> None:
    merged = merge_ranges(ranges)
    parts = list(cut_ranges(merged, size))
    assert as_set(parts) == as_set(merged)
    assert num_bytes_of(parts) == num_bytes_of(merged)
    assert all(0 < each.num_bytes <= size and each.start // size == (each.stop - 1) // size for each in parts)


def test_a_checksum_sees_one_flipped_bit() -> None:
    data = bytearray(range(256)) * 64
    before = checksum_bytes(data)
    data[5000] ^= 1
    assert checksum_bytes(memoryview(data)) != before


def test_a_range_covers_what_lies_in_it() -> None:
    whole = ByteRange(1, 10, 20)
    assert whole.covers(ByteRange(1, 10, 20))
    assert not whole.covers(ByteRange(0, 10, 20))
    assert not whole.covers(ByteRange(1, 10, 21))


@given(RANGES, RANGES)
def test_ranges_overlap_if_they_share_a_byte(first: list[ByteRange], second: list[ByteRange]) -> None:
    for each, other in itertools.product(first, second):
        assert each.overlaps(other) == bool(as_set([each]) & as_set([other]))

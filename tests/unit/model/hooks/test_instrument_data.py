"""Which rows and positions of a step are meant: absolute ones from the beginning of the text, negative ones from its end."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from lingualinked.errors import ArgumentError
from lingualinked.model.hooks.instrument_data import Choice, positions_in, rows_in

bounds = st.none() | st.integers(0, 20)


@given(bounds, bounds, st.none() | st.integers(1, 5), st.integers(0, 12), st.integers(1, 8))
def test_a_slice_of_the_text_is_that_slice_of_each_step(
    start: int | None, stop: int | None, step: int | None, past: int, num_new: int
) -> None:
    text = list(range(past + num_new))
    expected = [position - past for position in text[start:stop:step] if position >= past]
    assert list(positions_in(Choice((start, stop, step)), past, num_new)) == expected


@given(st.integers(-12, -1), st.integers(0, 12), st.integers(1, 8))
def test_a_slice_from_the_end_is_one_of_the_step(start: int, past: int, num_new: int) -> None:
    assert list(positions_in(Choice((start, None, None)), past, num_new)) == list(range(num_new))[start:]


def test_listed_positions() -> None:
    def listed(*positions: int) -> Choice:
        return Choice(None, (positions,))

    assert positions_in(listed(9, 3, 11, -1), past=8, num_new=4) == (1, 3, 3)
    assert positions_in(listed(3), past=8, num_new=1) == ()
    assert positions_in(Choice(None, ((8, 9), (10, 8))), past=8, num_new=4) == ((0, 1), (2, 0))
    with pytest.raises(ArgumentError, match="position -2 is not in a step of 1 token"):
        positions_in(listed(-2), past=8, num_new=1)
    with pytest.raises(ArgumentError, match="as many for each row"):
        positions_in(Choice(None, ((8, 9), (10, 1))), past=8, num_new=4)


def test_rows() -> None:
    assert rows_in(Choice(), 3) == range(3)
    assert rows_in(Choice((1, None, None)), 3) == range(1, 3)
    assert rows_in(Choice(None, ((2, -3),)), 3) == (2, 0)
    with pytest.raises(ArgumentError, match="row 3 is not in a step of 3 rows"):
        rows_in(Choice(None, ((3,),)), 3)

"""Numbers with their units."""

import pytest

from lingualinked.quantities import bytes_text, count_text, seconds_text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1023.7, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (-(2**30), "-1.0 GiB"),
        (2**42, "4.0 TiB"),
        (2**53, "8,192 TiB"),
    ],
)
def test_bytes_are_readable(number: float, text: str) -> None:
    assert bytes_text(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.2, "1 B"),
        (1, "1 B"),
        (1025, "1.01 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (2**30 + 1, "1.01 GiB"),
        (2**37, "128 GiB"),
    ],
)
def test_an_amount_that_must_suffice_is_never_less(number: float, text: str) -> None:
    assert bytes_text(number, round_up=True) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (2.5, "2.50 s"),
        (0.99999, "1.00 s"),
        (0.0123, "12.3 ms"),
        (0.9999e-3, "1.0 ms"),
        (5e-6, "5 µs"),
        (0, "0 µs"),
        (-2, "-2.00 s"),
    ],
)
def test_seconds_are_readable(number: float, text: str) -> None:
    assert seconds_text(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 stages"), (1, "1 stage"), (2, "2 stages"), (12_345, "12,345 stages")]
)
def test_nouns_are_counted(number: int, text: str) -> None:
    assert count_text(number, "stage") == text

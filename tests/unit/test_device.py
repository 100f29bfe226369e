"""A device is plain data that refuses what can't be used, by the field's name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lingualinked as ll
from lingualinked.device import parse_bytes

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


@pytest.mark.parametrize(
    ("amount", "number_of_bytes"),
    [
        (1, 1),
        ("17", 17),
        ("512MiB", 512 * 2**20),
        ("1.5 GB", 1_500_000_000),
        (" 2 gib ", 2**31),
        ("0.1GiB", 107_374_182),
    ],
)
def test_amounts_of_memory(amount: int | str, number_of_bytes: int) -> None:
    assert parse_bytes(amount) == number_of_bytes


@given(number=st.integers(1, 10**30), unit=st.sampled_from(sorted(UNITS)), blank=st.sampled_from(["", " "]))
def test_whole_numbers_are_exact_in_every_unit(number: int, unit: str, blank: str) -> None:
    assert parse_bytes(f"{number}{blank}{unit}") == number * UNITS[unit]


@given(text=st.text(max_size=12) | st.from_regex(r"[0-9.]{0,6} ?[KMGTkmgt]?[iI]?[bB]?", fullmatch=True))
def test_any_text_is_an_amount_or_refused_by_name(text: str) -> None:
    try:
        parsed = parse_bytes(text, "budget")
    except ll.ArgumentError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert parsed > 0
    assert not refusal or refusal.startswith(f"budget={text!r} ")


@pytest.mark.parametrize("amount", ["", "iB", "2G", "-1", "1e9", "٣GiB", "0", "0.4", 0, -5, True, 1.5, None])
def test_what_is_no_amount_of_memory(amount: Any) -> None:
    with pytest.raises(ll.ArgumentError, match="memory="):
        parse_bytes(amount)


def test_a_device_keeps_what_it_is_given() -> None:
    device = ll.Device(name="a", accelerator="cuda:1", threads=3, cpus=[0, 2], memory="2GiB")  # type: ignore[arg-type]
    assert (device.cpus, device.memory, device.memory_bytes) == ((0, 2), "2GiB", 2**31)
    assert ll.Device(name="b").memory_bytes is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        device.threads = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("name", value) for value in ("", " a", "a\n", "caller", None, 3)],
        *[("accelerator", value) for value in ("gpu", "cuda", "cuda:x", "", None)],
        *[("threads", value) for value in (0, -1, 1.5, True, "2")],
        *[("cpus", value) for value in ((), (-1,), ("0",), (0, 0), (True,), 3, "01")],
        *[("memory", value) for value in ("much", 0, -1, 1.5, True)],
    ],
)
def test_what_a_device_can_not_be(field: str, value: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=field):
        ll.Device(**{"name": "a", field: value})

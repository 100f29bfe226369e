"""Leases never exceed what there is, and what is left is said."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from lingualinked.errors import ResourceError
from lingualinked.worker.daemon.memory_shares import MemoryShares

MIB = 1 << 20


def test_all_that_is_left_is_leased_unless_a_device_states_less() -> None:
    shares = MemoryShares(10 * MIB)
    assert shares.lease(b"a", 4 * MIB) == 4 * MIB
    with pytest.raises(
        ResourceError, match=r"7.0 MiB is not free: of 10.0 MiB .* 6.0 MiB are not leased; state a smaller"
    ):
        shares.lease(b"b", 7 * MIB)
    assert shares.lease(b"b", None) == 6 * MIB
    with pytest.raises(ResourceError, match="memory is not free"):
        shares.lease(b"c", None)
    shares.release(b"a")
    assert shares.left_bytes == 4 * MIB


def test_without_a_limit_each_gets_what_it_states() -> None:
    shares = MemoryShares(None)
    assert (shares.lease(b"a", None), shares.lease(b"b", 2**50), shares.left_bytes) == (None, 2**50, None)


@given(st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(1, 1000))))
def test_leases_never_exceed_the_total(total: int, asked: list[tuple[int, int | None]]) -> None:
    shares = MemoryShares(total)
    held: dict[bytes, int] = {}
    for number, amount in asked:
        holder = bytes([number])
        if holder in held:
            shares.release(holder)
            del held[holder]
            continue
        try:
            granted = shares.lease(holder, amount)
        except ResourceError:
            assert (amount or 1) > total - sum(held.values())
        else:
            assert granted is not None
            held[holder] = granted
        assert sum(held.values()) <= total
        assert shares.left_bytes == total - sum(held.values())

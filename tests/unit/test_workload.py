"""A workload is four positive numbers."""

from __future__ import annotations

from typing import Any

import pytest

import lingualinked as ll


def test_what_follows_from_it() -> None:
    workload = ll.Workload(prompt_tokens=100, new_tokens=12, batch_size=3, num_sessions=4)
    assert workload.num_tokens == 112
    assert workload.num_rows == 12
    # Decode steps 2 to 12 of the answer find 100, 101, ..., 110 tokens.
    assert workload.mean_context == pytest.approx(sum(range(100, 111)) / 11)


@pytest.mark.parametrize("field", ["prompt_tokens", "new_tokens", "batch_size", "num_sessions"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None, 2**53 + 1, 10**400])
def test_what_is_no_number_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=f"{field}={value!r} of a workload"):
        ll.Workload(**{field: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "most", 2**60])
def test_a_chunk_of_prompts_has_a_size(value: Any) -> None:
    with pytest.raises(ll.ArgumentError, match=f"prefill_chunk_size={value!r} of a workload"):
        ll.Workload(prefill_chunk_size=value)
    with pytest.raises(ll.ArgumentError, match="more than 1,024 chunks"):
        ll.Workload(prompt_tokens=2**40, prefill_chunk_size=8)
    assert ll.Workload(prompt_tokens=10, prefill_chunk_size=4).chunks == ((4, 0), (4, 4), (2, 8))
    assert (
        ll.Workload(prompt_tokens=10).chunks
        == ll.Workload(prompt_tokens=10, prefill_chunk_size=99).chunks
        == ((10, 0),)
    )


@pytest.mark.parametrize("value", [1, (1,), (1, 2, 3), (1, -1), (1, 10**30), (True, 1), (1.0, 1), "12", None])
def test_trusted_layers_are_two_counts(value: Any) -> None:
    with pytest.raises(ll.ArgumentError, match="trusted_layers="):
        ll.Workload(trusted_layers=value)
    assert ll.Workload(trusted_layers=[2, 1]) == ll.Workload(trusted_layers=(2, 1))  # type: ignore[arg-type]

"""The KV budget counts what sessions hold together."""

from __future__ import annotations

import gc

import pytest

import lingualinked as ll
from lingualinked.cluster.kv_budget import KVBudget


def test_sessions_share_a_budget() -> None:
    budget = KVBudget(10)
    budget.hold(1, 4)
    budget.hold(2, 6)
    with pytest.raises(ll.KVCapacityError, match=r"5 tokens of KV for this session and 6 of others.*max_kv_tokens=10"):
        budget.hold(1, 5)
    budget.release(2)
    budget.hold(1, 10)  # all that it holds, not so many more
    budget.release(1)
    budget.release(1)
    budget.hold(3, 10)


def test_a_refusal_changes_nothing() -> None:
    budget = KVBudget(10)
    budget.hold(1, 8)
    with pytest.raises(ll.KVCapacityError):
        budget.hold(1, 11)
    budget.hold(2, 2)


def test_no_limit_counts_nothing() -> None:
    budget = KVBudget(None)
    budget.hold(1, 10**12)
    budget.hold_as_much(2, 1)


def test_a_copy_holds_as_much_as_what_it_is_made_of() -> None:
    budget = KVBudget(10)
    budget.hold(1, 4)
    budget.hold_as_much(2, 1)
    with pytest.raises(ll.KVCapacityError, match=r"4 tokens of KV for this session and 8 of others"):
        budget.hold_as_much(3, 1)
    budget.hold(3, 2)


def test_a_finalizer_may_release_in_the_middle_of_a_hold() -> None:
    budget = KVBudget(10)
    budget.hold(1, 10)

    class Abandoned:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            budget.release(1)

    class Collecting(int):
        """A number whose use runs the garbage collector, as any allocation might."""

        def __gt__(self, other: object) -> bool:
            gc.collect()
            return int(self) > int(other)  # type: ignore[call-overload]

        def __radd__(self, other: int) -> Collecting:
            return Collecting(int(self) + other)

    Abandoned()
    with pytest.raises(ll.KVCapacityError):
        budget.hold(2, Collecting(1))
    budget.hold(2, 1)


def test_what_tries_smaller_batches_knows_that_memory_does_not_suffice() -> None:
    """As accelerate's should_reduce_batch_size looks at errors."""
    errors: list[Exception] = [ll.DeviceMemoryError("a", "MemoryError: no")]
    with pytest.raises(ll.KVCapacityError) as caught:
        KVBudget(1).hold(1, 2)
    for error in (*errors, caught.value):
        assert isinstance(error, RuntimeError)
        assert len(error.args) == 1
        assert " out of memory." in error.args[0]

"""The KV budget counts what sessions hold together."""

from __future__ import annotations

import contextlib
import gc
import random

import pytest

import lingualinked as ll
from lingualinked.cluster.kv.kv_budget import KVBudget


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


class Keeper:
    """Keeps sessions that it can do without."""

    def __init__(self, budget: KVBudget, *sessions: int) -> None:
        self.budget, self.sessions, self.num_told = budget, [*sessions], 0
        budget.add_user(self)

    def give_up_one(self) -> bool:
        if not self.sessions:
            return False
        self.budget.release(self.sessions.pop(0))
        return True

    def handle_room(self) -> None:
        self.num_told += 1


def test_room_may_be_reserved_before_it_is_held() -> None:
    budget = KVBudget(10)
    assert budget.reserve(1, 8)
    assert not budget.reserve(2, 3)
    budget.hold(1, 2)
    with pytest.raises(ll.KVCapacityError, match=r"3 tokens of KV for this session and 8 of others"):
        budget.hold(2, 3)
    budget.hold(1, 9)
    assert budget.free_share == pytest.approx(0.1)
    assert budget.reserve(1, 5)
    budget.release(1)
    assert budget.free_share == 1
    assert KVBudget(None).reserve(1, 10**12)


def test_what_is_only_kept_is_given_up_before_a_session_is_refused() -> None:
    budget = KVBudget(10)
    for session in (1, 2, 3):
        budget.hold(session, 3)
    keeper = Keeper(budget, 1, 2)
    budget.hold(4, 4)
    assert keeper.sessions == [2]
    assert budget.reserve(5, 3)
    assert keeper.sessions == []
    assert keeper.num_told == 2
    assert not budget.reserve(6, 1)
    assert not budget.make_room(1)
    budget.release(6)
    assert keeper.num_told == 2  # for it held nothing
    budget.release(5)
    assert budget.make_room(3)


def test_what_others_hold_is_what_the_sessions_add_up_to() -> None:
    """After any calls, in any order; of what a session holds and has reserved, the larger number counts."""
    rng = random.Random(0)
    budget = KVBudget(200)
    held: dict[int, int] = {}
    reserved: dict[int, int] = {}
    for _ in range(2000):
        session, num_tokens = rng.randrange(8), rng.randrange(60)
        kind = rng.randrange(5)
        if kind == 0 and budget.reserve(session, num_tokens):
            reserved[session] = num_tokens
        elif kind == 1:
            budget.release(session)
            held.pop(session, None)
            reserved.pop(session, None)
        elif kind == 2:
            budget.release(8)  # what is joined is a new session
            held.pop(8, None)
            budget.join([session, (session + 1) % 8], 8)
            held[8] = sum(held.pop(each, 0) for each in (session, (session + 1) % 8))
        elif kind == 3:
            wanted = {each: rng.randrange(40) for each in rng.sample(range(8), 3)}
            with contextlib.suppress(ll.KVCapacityError):
                budget.hold_all(wanted)
                held.update(wanted)
        else:
            with contextlib.suppress(ll.KVCapacityError):
                budget.hold(session, num_tokens)
                held[session] = num_tokens
        counted = sum(max(held.get(each, 0), reserved.get(each, 0)) for each in range(10))
        assert budget.free_share == pytest.approx(1 - counted / 200)

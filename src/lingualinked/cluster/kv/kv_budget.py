"""How much KV the sessions of a model may hold together.

Counts rows x tokens; knows neither bytes nor where KV lies.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol

from lingualinked.errors import KVCapacityError
from lingualinked.quantities import count_text

_NOBODY = -1  # no session has this number


class BudgetUser(Protocol):
    """Who keeps KV that may be given up, or waits for room; called on any thread, `handle_room` also by a finalizer."""

    def give_up_one(self) -> bool:
        """End a session whose KV is only kept; whether there was one."""

    def handle_room(self) -> None:
        """Learn that there is more room than before."""


class KVBudget:
    """Rows x tokens of KV that all sessions of a model may hold together; ``None``: without a limit."""

    def __init__(self, max_tokens: int | None) -> None:
        self.max_tokens = max_tokens
        self._held: dict[int, int] = {}
        self._reserved: dict[int, int] = {}
        self._num_counted = 0  # row-tokens that all sessions hold or have reserved, of each the larger number
        self._users: weakref.WeakSet[BudgetUser] = weakref.WeakSet()
        self._lock = threading.RLock()  # a finalizer releases, and may run in the middle of a hold

    @property
    def free_share(self) -> float:
        """Which share of the budget is neither held nor reserved; 1 without a limit."""
        return 1.0 if not self.max_tokens else 1 - self._others(_NOBODY) / self.max_tokens

    def add_user(self, user: BudgetUser) -> None:
        """Ask a user to give up what it keeps before a request is refused, and tell it when there is room."""
        self._users.add(user)

    def hold(self, session: int, num_tokens: int) -> None:
        """Let a session hold so many row-tokens in all.

        Raises KVCapacityError if all together would exceed the limit; nothing changes then.
        """
        if self.max_tokens is None:
            return
        if num_tokens <= self._reserved.get(session, 0):
            with self._lock:
                self._set(session, self._held, num_tokens)
        elif not self._change(session, self._held, num_tokens):
            raise KVCapacityError(
                f"KV budget out of memory. {count_text(num_tokens, 'token')} of KV for this session and {self._others(session):,} of "
                f"others exceed max_kv_tokens={self.max_tokens}: end other sessions, shorten the text, or raise it"
            )

    def hold_up_to(self, session: int, least: int, most: int) -> int:
        """Let a session hold as many row-tokens in all as there is room for, at least and at most so many; return how many.

        Raises KVCapacityError if there is no room for the least.
        """
        if self.max_tokens is not None:
            most = max(least, min(most, max(self.max_tokens - self._others(session), self._reserved.get(session, 0))))
        self.hold(session, most)
        return most

    def make_room(self, num_tokens: int) -> bool:
        """Let others give up what they keep until so many row-tokens are free; return whether they are."""
        return self.max_tokens is None or self._change(_NOBODY, {}, num_tokens)

    def reserve(self, session: int, num_tokens: int) -> bool:
        """Keep room for so many row-tokens of a session, until it ends; return whether there is so much."""
        shrinks = num_tokens < self._reserved.get(session, 0)
        has_room = self.max_tokens is None or self._change(session, self._reserved, num_tokens)
        if shrinks:
            self._tell_of_room()
        return has_room

    def hold_all(self, held: Mapping[int, int]) -> None:
        """Let several sessions hold so many row-tokens each, or none of them if that would exceed the limit."""
        before = {session: self._held.get(session, 0) for session in held}
        try:
            for session, num_tokens in held.items():
                self.hold(session, num_tokens)
        except KVCapacityError:
            with self._lock:
                for session, num_tokens in before.items():
                    self._set(session, self._held, num_tokens)
            raise

    def join(self, sessions: Iterable[int], joined: int) -> None:
        """Let a session hold in place of others what they hold."""
        with self._lock:
            held = [self._remove(session, self._held) for session in sessions if session in self._held]
            if held:
                self._set(joined, self._held, sum(held))

    def hold_as_much(self, session: int, other: int) -> None:
        """Let a session hold as much as another does."""
        self.hold(session, self._held.get(other, 0))

    def release(self, session: int) -> None:
        """Give back what a session holds."""
        with self._lock:
            held = self._remove(session, self._held), self._remove(session, self._reserved)
        if any(held):
            self._tell_of_room()

    def _tell_of_room(self) -> None:
        for user in [*self._users]:
            user.handle_room()

    def _change(self, session: int, numbers: dict[int, int], num_tokens: int) -> bool:
        """Change what a session holds or has reserved if there is room, or once others have given up what they keep."""
        while True:
            with self._lock:
                counted, others = self._counted(session), self._others(session)
                if num_tokens <= counted or not others + num_tokens > (self.max_tokens or 0):
                    self._set(session, numbers, num_tokens)
                    return True
            # Without the lock: whoever gives up has one of its own.
            if not any(user.give_up_one() for user in [*self._users]):
                return False

    def _others(self, session: int) -> int:
        """Row-tokens that all other sessions hold or have reserved; a finalizer may release some at any moment."""
        with self._lock:
            return self._num_counted - self._counted(session)

    def _counted(self, session: int) -> int:
        return max(self._held.get(session, 0), self._reserved.get(session, 0))

    def _set(self, session: int, numbers: dict[int, int], num_tokens: int) -> None:
        """Set a number of one session, with the lock."""
        before = self._counted(session)
        numbers[session] = num_tokens
        added = self._counted(session) - before  # before the sum is read, which a finalizer may change in between
        self._num_counted += added

    def _remove(self, session: int, numbers: dict[int, int]) -> int:
        """Remove a number of one session, with the lock; return it, or 0."""
        before = self._counted(session)
        num_tokens = numbers.pop(session, 0)
        removed = before - self._counted(session)
        self._num_counted -= removed
        return num_tokens

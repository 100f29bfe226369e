"""The KV of the requests of a continuous batch: one session for each, and those of ended ones while there is room.

Knows sessions and the KV budget of their model; not which request is served.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.cluster.sessions.session import Session
    from lingualinked.sharded.batching.settings import BatchSettings

_MAX_KEPT = 16  # ended requests, where no budget limits them


class SessionRooms:
    """Sessions by slot, as `events.Rooms` says, within the budget of the model and what the settings allow.

    Those that are only kept are given up, the oldest first, whoever needs their room, in any thread. ``handle_room`` is called when
    other sessions of the model have ended.
    """

    def __init__(self, pipeline: Pipeline, settings: BatchSettings, handle_room: Callable[[], None]) -> None:
        self._pipeline = pipeline
        self._max_tokens = settings.max_kv_tokens
        self._limits = (settings.max_kv_tokens, settings.max_text_tokens, pipeline.kv_budget.max_tokens)
        self.handle_room = handle_room
        self._lock = threading.RLock()
        self._sessions: dict[int, Session] = {}
        self._reserved: dict[int, int] = {}
        self._kept: list[int] = []  # oldest first
        self._pinned: list[int] = []
        self._given_up: list[int] = []
        pipeline.kv_budget.add_user(self)

    def session(self, slot: int) -> Session:
        """Return the session of a slot."""
        return self._sessions[slot]

    def fits(self, num_tokens: int) -> bool:
        """Whether there is so much room when nothing else is held."""
        return all(most is None or num_tokens <= most for most in self._limits)

    def free_share(self) -> float:
        """Return which share of the room is free: 1 where it has no limit."""
        own = 1.0 if not self._max_tokens else 1 - sum(self._reserved.values()) / self._max_tokens
        return min(own, self._pipeline.kv_budget.free_share)

    def reserve(self, slot: int, num_tokens: int) -> bool:
        """Let a slot, which may be new, hold so many tokens in all; whether there is room for them."""
        others = self._reserved.keys() - {slot}
        while self._max_tokens and sum(self._reserved[each] for each in others) + num_tokens > self._max_tokens:
            if not self.give_up_one():
                return False
            others = self._reserved.keys() - {slot}
        is_new = slot not in self._sessions
        if is_new and not self._pipeline.kv_budget.make_room(num_tokens):
            return False
        session = self._pipeline.open_session() if is_new else self._sessions[slot]
        if not session.reserve_budget(num_tokens):
            if is_new:
                session.end()
            return False
        session.reserve(num_tokens)
        with self._lock:
            self._sessions[slot], self._reserved[slot] = session, num_tokens
        return True

    def free(self, slot: int) -> None:
        """Free a slot and its KV."""
        with self._lock:
            del self._reserved[slot]
            session = self._sessions.pop(slot)
        session.end()

    def keep(self, slot: int, num_tokens: int) -> None:
        """Keep the KV of a slot that is in use no longer until its room is needed."""
        with self._lock:
            self._reserved[slot] = num_tokens
            self._kept.append(slot)
        self._sessions[slot].reserve_budget(num_tokens)
        if len(self._kept) > _MAX_KEPT:
            self.give_up_one()

    def pin(self, slot: int) -> bool:
        """Keep a slot, which is kept, until `unpin`; whether it is still there."""
        with self._lock:
            if slot in self._kept:
                self._pinned.append(slot)
            return slot in self._kept

    def unpin(self, slot: int) -> None:
        """Allow a slot that is kept to be given up again."""
        with self._lock:
            self._pinned.remove(slot)

    def give_up_one(self) -> bool:
        """Free the slot that has been kept longest; whether there was one."""
        with self._lock:
            slot = next((slot for slot in self._kept if slot not in self._pinned), None)
            if slot is None:
                return False
            self._kept.remove(slot)
            self._given_up.append(slot)
            del self._reserved[slot]
            session = self._sessions.pop(slot)
        session.end()
        return True

    def give_up(self) -> bool:
        """Free all slots that are kept; whether there were any."""
        return sum(self.give_up_one() for _ in [*self._kept]) > 0

    def pop_given_up(self) -> list[int]:
        """Return the slots that were kept and have been freed since the last call."""
        with self._lock:
            given_up, self._given_up = self._given_up, []
        return given_up

    def close(self) -> None:
        """End all sessions."""
        with self._lock:
            sessions, self._sessions = [*self._sessions.values()], {}
            self._reserved, self._kept, self._pinned = {}, [], []
        for session in sessions:
            session.end()

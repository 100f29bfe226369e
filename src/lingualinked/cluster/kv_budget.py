"""How much KV the sessions of a model may hold together.

Counts rows x tokens; knows neither bytes nor where KV lies.
"""

from __future__ import annotations

import threading

from lingualinked.errors import KVCapacityError
from lingualinked.quantities import count_text


class KVBudget:
    """Rows x tokens of KV that all sessions of a model may hold together; ``None``: without a limit."""

    def __init__(self, max_tokens: int | None) -> None:
        self._max_tokens = max_tokens
        self._held: dict[int, int] = {}
        self._lock = threading.RLock()  # a finalizer releases, and may run in the middle of a hold

    def hold(self, session: int, num_tokens: int) -> None:
        """Let a session hold so many row-tokens in all.

        Raises KVCapacityError if all together would exceed the limit; nothing changes then.
        """
        if self._max_tokens is None:
            return
        with self._lock:
            others = sum(self._held.values()) - self._held.get(session, 0)
            if others + num_tokens > self._max_tokens:
                raise KVCapacityError(
                    f"KV budget out of memory. {count_text(num_tokens, 'token')} of KV for this session and {others:,} of others exceed "
                    f"max_kv_tokens={self._max_tokens}: end other sessions, shorten the text, or raise it"
                )
            self._held[session] = num_tokens

    def hold_as_much(self, session: int, other: int) -> None:
        """Let a session hold as much as another does."""
        with self._lock:
            self.hold(session, self._held.get(other, 0))

    def release(self, session: int) -> None:
        """Give back what a session holds."""
        with self._lock:
            self._held.pop(session, None)

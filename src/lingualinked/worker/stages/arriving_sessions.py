"""The sessions whose KV arrives at a stage while they still run elsewhere, and the budget that bounds them.

Knows pieces of KV and their state; neither steps nor messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import msgspec

from lingualinked.errors import ProtocolError
from lingualinked.model.context import StepContext
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.protocol.moving import MODULES, SessionState
from lingualinked.quantities import count_text
from lingualinked.worker.kv.kv_copy import Piece, StatePiece, write_pieces
from lingualinked.worker.stages.hosted_session import HostedSession

_MAX_SESSIONS = 1 << 16


class ArrivingSessions:
    """The sessions that move to one stage; ``new_cache`` makes the KV cache of one, by its ``max_cache_len``."""

    def __init__(self, new_cache: Callable[[int], StageCache], max_kv_tokens: int | None) -> None:
        self.sessions: dict[int, HostedSession] = {}
        self._new_cache = new_cache
        self._max_kv_tokens = max_kv_tokens

    def __contains__(self, session: int) -> bool:
        return session in self.sessions

    def write_kv(self, session: int, pieces: Sequence[Piece | StatePiece], max_cache_len: int = 0) -> None:
        """Write KV of a session that still runs elsewhere, in a KV cache of `max_cache_len` tokens per row; 0: one that grows.

        Raises ProtocolError if the pieces don't fit those before, or belong to layers that the stage does not hold.
        """
        if session not in self.sessions:
            if len(self.sessions) >= _MAX_SESSIONS:
                raise ProtocolError(f"more than {_MAX_SESSIONS} sessions move here at once")
            self.sessions[session] = HostedSession(self._new_cache(max_cache_len), StepContext())
        incoming = self.sessions[session]
        cache = incoming.cache
        assert cache is not None
        if cache.max_cache_len != max_cache_len:
            raise ProtocolError(
                f"KV arrived for a KV cache of max_cache_len={max_cache_len}, and before for one of {cache.max_cache_len}"
            )
        fitting: list[Piece] = []
        states: list[StatePiece] = []
        for piece in pieces:
            if isinstance(piece, StatePiece):
                states.append(piece)
                continue
            place, num_rows = piece.place, len(piece.keys)
            if place.slot not in cache.owned:
                raise ProtocolError(f"KV arrived for layer slot {place.slot}, which this stage does not hold")
            self._check_size(incoming, num_rows, max_cache_len or place.position + piece.keys.shape[2])
            if self._max_kv_tokens is not None:
                room = self._max_kv_tokens // max(1, num_rows) + 1
                place = msgspec.structs.replace(place, capacity=min(place.capacity, room))
            fitting.append(dataclasses.replace(piece, place=place))
        write_pieces(fitting, cache)
        for piece in states:
            write_pieces([piece], cache)
            if piece.place.slot != MODULES:
                layer = cache.owned.get(piece.place.slot)
                num_tokens = incoming.num_tokens or 1 if layer is None else layer.stop
                self._check_size(incoming, cache.num_rows, num_tokens)

    def record_state(self, session: int, context: StepContext, state: SessionState) -> None:
        """Record the state, apart from KV, of a session that moves here."""
        incoming = self.sessions[session]
        incoming.context, incoming.number = context, state.number
        assert incoming.cache is not None
        incoming.cache.record_past(state.records_past)
        incoming.cache.reserve(state.reserved_tokens)
        incoming.cache.arriving_lags = {**incoming.cache.arriving_lags, **state.lags}

    def _check_size(self, session: HostedSession, num_rows: int, num_tokens: int) -> None:
        """Check the budget of the sessions that move here, and record the size of this one's KV."""
        check_room(num_rows * num_tokens, self._max_kv_tokens)
        num_tokens = max(num_tokens, session.num_tokens)
        others = sum(each.num_rows * each.num_tokens for each in self.sessions.values() if each is not session)
        # Twice the budget: KV that came in advance may be of sessions that have since ended, or been cropped, elsewhere.
        check_room((others + num_rows * num_tokens) // 2, self._max_kv_tokens)
        session.num_rows, session.num_tokens = num_rows, num_tokens


def check_room(num_tokens: int, max_kv_tokens: int | None) -> None:
    """Raise ProtocolError if KV, in all rows, exceeds the caller's budget; ``None``: there is none."""
    if max_kv_tokens is not None and num_tokens > max_kv_tokens:
        raise ProtocolError(
            f"KV of {count_text(num_tokens, 'token')} in all rows exceeds max_kv_tokens={max_kv_tokens}"
        )

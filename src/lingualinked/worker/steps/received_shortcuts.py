"""What stages have sent a later one straight, beside hidden states, until the step comes that it belongs to.

Knows one stage's sources and their tensors; neither sockets nor what the tensors are for.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.steps import ShortcutTensors
from lingualinked.quantities import bytes_text, count_text

_MOST_BYTES = 1 << 30
"""Of one stage: the tensors of steps that wait."""

_MOST_STEPS = 1 << 16
"""Of one stage, from whichever sessions."""

_NUM_ENDED = 1 << 10
"""Sessions that are remembered once they have ended: what was sent before may still come."""


class ReceivedShortcuts:
    """The tensors with these names that have arrived from the stages in `sources`, which are named by their place in the plan."""

    def __init__(self, sources: Mapping[int, str], names: Collection[str]) -> None:
        self._sources = sources
        self._names = frozenset(names)
        # By session and step, then by source; None: dropped, and the step fails.
        self._held: dict[tuple[int, int], dict[int, dict[str, Tensor]] | None] = {}
        self._ended: collections.deque[int] = collections.deque(maxlen=_NUM_ENDED)
        self._num_bytes = 0

    def sender(self, message: ShortcutTensors) -> str | None:
        """Return the worker that may send a message, if any may."""
        return self._sources.get(message.source)

    def receive(self, message: ShortcutTensors, tensors: tuple[Tensor, ...]) -> set[int]:
        """Keep what has come for a step; return the sessions that may have a step which can run, or fail, now.

        If too much waits, that of the oldest steps is dropped, and they fail. Raises ProtocolError if it is not as announced.
        """
        key, names = (message.session, message.number), message.names
        known = self._held.get(key, {})
        if len(names) != len(tensors) or len(set(names)) < len(names) or (known and message.source in known):
            raise ProtocolError(f"{count_text(len(tensors), 'tensor')} arrived for {names!r:.200}, or once too often")
        if message.session in self._ended or known is None:
            return set()
        due = self._names.difference(*known.values())
        if not due.issuperset(names):
            raise ProtocolError(
                f"tensors arrived as {names!r:.200} from stage {message.source}, and {sorted(due)} are due"
            )
        known[message.source] = dict(zip(names, tensors, strict=True))
        self._held[key] = known
        self._num_bytes += sum(each.nbytes for each in tensors)
        sessions = {message.session}
        for oldest in list(self._held) if self._num_bytes > _MOST_BYTES else ():
            if oldest != key and self._num_bytes > _MOST_BYTES:
                self._drop(oldest)
                sessions.add(oldest[0])
        if len(self._held) > _MOST_STEPS:
            self._drop(next(iter(self._held)))
            del self._held[next(iter(self._held))]
        return sessions

    def put(self, session: int, number: int, shortcuts: Mapping[str, Tensor]) -> None:
        """Put tensors at hand for a step, as if other stages had sent them."""
        self._held[session, number] = {-1: dict(shortcuts)}
        self._num_bytes += sum(each.nbytes for each in shortcuts.values())

    def are_complete(self, session: int, number: int) -> bool:
        """Return whether all has come for a step, or it can't come any more, so that the step fails."""
        held = self._held.get((session, number), {})
        return not self._sources or held is None or self._sources.keys() <= held.keys()

    def remove(self, session: int, number: int) -> dict[str, Tensor]:
        """Return what has come for a step, by name, and keep it no longer; raise ProtocolError if it was dropped."""
        held = self._drop((session, number))
        del self._held[session, number]
        if held is None:
            raise ProtocolError(
                f"tensors for step {number} of session {session} were dropped: more than {bytes_text(_MOST_BYTES)} that skip stages "
                "waited here; run fewer or shorter prompts at once"
            )
        return {name: tensor for tensors in held.values() for name, tensor in tensors.items()}

    def end_session(self, session: int, *, may_return: bool = False) -> None:
        """Drop what is kept for a session, and what may still come, unless the session may run here again."""
        if not may_return:
            self._ended.append(session)
        for key in [key for key in self._held if key[0] == session]:
            self._drop(key)
            del self._held[key]

    def _drop(self, key: tuple[int, int]) -> dict[int, dict[str, Tensor]] | None:
        """Free the tensors of a step, and return them; it is remembered that they were dropped."""
        held = self._held.get(key, {})
        self._held[key] = None
        self._num_bytes -= sum(each.nbytes for tensors in (held or {}).values() for each in tensors.values())
        return held

"""What stages have sent a later one straight, beside hidden states, until the step comes that it belongs to.

Knows one stage's sources and their tensors; neither sockets nor what the tensors are for.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.protocol.steps import ShortcutTensors
from lingualinked.quantities import count_text

_MOST_BYTES = 1 << 30
"""Of one stage: the tensors of steps in flight that have not come yet."""


class ReceivedShortcuts:
    """The tensors that have arrived from the stages in `sources`, which are named by their place in the plan."""

    def __init__(self, sources: Mapping[int, str]) -> None:
        self._sources = sources
        self._held: dict[tuple[int, int], dict[int, dict[str, Tensor]]] = {}  # by session and step, then by source
        self._num_bytes = 0

    def sender(self, message: ShortcutTensors) -> str | None:
        """Return the worker that may send a message, if any may."""
        return self._sources.get(message.source)

    def receive(self, message: ShortcutTensors, tensors: tuple[Tensor, ...]) -> None:
        """Keep what has come for a step; raise ProtocolError if it is not as announced.

        If too much waits, the oldest is dropped: what was made for a step that never comes, since its session has ended.
        """
        key, num_bytes = (message.session, message.number), sum(each.nbytes for each in tensors)
        if len(message.names) != len(tensors) or message.source in self._held.get(key, {}):
            raise ProtocolError(f"{count_text(len(tensors), 'tensor')} arrived for {message.names}, or once too often")
        while self._held and self._num_bytes + num_bytes > _MOST_BYTES:
            self.remove(*next(iter(self._held)))
        self._held.setdefault(key, {})[message.source] = dict(zip(message.names, tensors, strict=True))
        self._num_bytes += num_bytes

    def put(self, session: int, number: int, shortcuts: Mapping[str, Tensor]) -> None:
        """Put tensors at hand for a step, as if other stages had sent them."""
        self._held[session, number] = {-1: dict(shortcuts)}
        self._num_bytes += sum(each.nbytes for each in shortcuts.values())

    def are_complete(self, session: int, number: int) -> bool:
        """Return whether all has come for a step."""
        return not self._sources or self._sources.keys() <= self._held.get((session, number), {}).keys()

    def remove(self, session: int, number: int) -> dict[str, Tensor]:
        """Return what has come for a step, by name, and keep it no longer."""
        found: dict[str, Tensor] = {}
        for tensors in self._held.pop((session, number), {}).values():
            found |= tensors
        self._num_bytes -= sum(each.nbytes for each in found.values())
        return found

    def end_session(self, session: int) -> None:
        """Drop what is kept for a session."""
        for key in [key for key in self._held if key[0] == session]:
            self.remove(*key)

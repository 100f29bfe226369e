"""Connections of a mailbox that somebody waits for, within a bound.

Knows a mailbox and what to call; not what the connections are for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lingualinked.transport.mailbox import Mailbox
from lingualinked.transport.sockets.connection_monitor import CONNECT_S


class AwaitedConnections:
    """Says of each connection that it has come about, or why it has not; on the thread that owns the mailbox."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        # By peer: until when, and whom to tell.
        self._awaited: dict[str, tuple[float, list[Callable[[str], None]]]] = {}

    def add(self, name: str, on_decided: Callable[[str], None]) -> None:
        """Call ``on_decided`` with an empty text once a connected peer is reached, or with a reason after `CONNECT_S`.

        `decide` does so, or `forget`.
        """
        # Asked now, so that `receive` returns once it is connected.
        deadline_s = time.monotonic() + (0.0 if self._mailbox.is_connected(name) else CONNECT_S)
        self._awaited.setdefault(name, (deadline_s, []))[1].append(on_decided)

    def forget(self, name: str) -> None:
        """Forget a peer, and tell who waits for it; before it is disconnected."""
        for on_decided in self._awaited.pop(name, (0.0, []))[1]:
            on_decided("it was disconnected meanwhile")

    def time_left(self) -> float | None:
        """Seconds until `decide` is due, unless `receive` returns before; ``None`` if nothing is awaited."""
        if not self._awaited:
            return None
        return max(0.0, min(deadline_s for deadline_s, _ in self._awaited.values()) - time.monotonic())

    def decide(self) -> None:
        """Tell who waits for a connection that has come about, or that has had its time."""
        for name, (deadline_s, listeners) in list(self._awaited.items()):
            is_connected = self._mailbox.is_connected(name)
            if is_connected or time.monotonic() >= deadline_s:
                del self._awaited[name]
                reason = "" if is_connected else self._mailbox.explain_unconnected(name)
                for on_decided in listeners:
                    on_decided(reason)

"""How a process that has started becomes a worker: it says which key is its own, and is told who it is.

Knows one socket and one worker; not how the process was started.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import msgspec

from lingualinked.errors import LingualinkedError
from lingualinked.protocol.boot import Boot, WorkerKey


class Booting:
    """The caller's end of the conversation with a worker that starts; the channel is closed once all is said."""

    def __init__(self, channel: socket.socket, boot: Boot) -> None:
        self._channel = channel
        self._boot = boot
        self._text = b""

    def fileno(self) -> int:
        """Return the descriptor that is readable when the worker has said something; -1 once all is said."""
        return self._channel.fileno()

    def answer(self, admit: Callable[[str, str], None]) -> None:
        """Read the worker's key; once it is complete, authorise it and send the worker its `Boot`."""
        try:
            self._text += (data := self._channel.recv(4096))
            if data and not self._text.endswith(b"\n"):
                return
            # In this order: a worker connects as soon as it has its Boot, and a refusal is final.
            admit(self._boot.name, msgspec.json.decode(self._text, type=WorkerKey).public_key)
            self._channel.sendall(msgspec.json.encode(self._boot) + b"\n")
        except (OSError, msgspec.DecodeError, LingualinkedError):
            pass  # it ends when the channel is closed, which who watches it sees and tells
        self.close()

    def close(self) -> None:
        """Close the conversation; a worker without a `Boot` ends."""
        with contextlib.suppress(OSError):
            self._channel.close()

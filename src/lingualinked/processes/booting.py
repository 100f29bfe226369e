"""How a process that has started becomes a worker: it says which key is its own, and is told who it is.

Knows one socket; neither how the process was started nor who decides what it is told.
"""

from __future__ import annotations

import contextlib
import socket

import msgspec

from lingualinked.protocol.boot import Boot, WorkerKey


class Booting:
    """One end of the conversation with a worker that starts; the channel is closed once all is said.

    Between the two messages may lie the way to a caller on another machine, and back.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._text = b""
        self._has_key = False

    def fileno(self) -> int:
        """Return the descriptor that is readable when the worker says its key; -1 once it has said something."""
        return -1 if self._has_key else self._channel.fileno()

    def read_key(self) -> str | None:
        """Return the worker's key once it is complete; what says something else is hung up on, and ends."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            self._text += (data := self._channel.recv(4096))
            if data and not self._text.endswith(b"\n"):
                return None
            public_key = msgspec.json.decode(self._text, type=WorkerKey).public_key
            self._has_key = True
            return public_key
        self.close()
        return None

    def send_boot(self, boot: Boot) -> None:
        """Tell the worker who it is; it may connect to the caller at once, where a refusal is final."""
        with contextlib.suppress(OSError):  # one that has ended is seen by who watches it
            self._channel.sendall(msgspec.json.encode(boot) + b"\n")
        self.close()

    def close(self) -> None:
        """Close the conversation; a worker without a `Boot` ends."""
        with contextlib.suppress(OSError):
            self._channel.close()

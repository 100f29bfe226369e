"""Closes a listening socket to new connections while too many of its open ones have shown no key.

Knows one socket and the kernel's filters; no keys and no libzmq. Has no effect where the kernel has no such filters.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
import sys

logger = logging.getLogger("lingualinked.transport")

MOST_WAITING = 100
"""Connections in their handshake at which a gate closes; it opens again at half as many."""

_ATTACH_FILTER, _DETACH_FILTER = 26, 27  # SO_ATTACH_FILTER, SO_DETACH_FILTER
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # one instruction: return 0


class Gate:
    """The gate of one listening socket; for use from any one thread at a time.

    While it is closed, the kernel drops the packets with which connections begin, and their makers repeat them some
    seconds later. Connections that are established have no part in it. Without it, whoever reaches the port could use up
    this process's file descriptors without a key.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.is_closed = False
        self._was_closed = False

    def adjust(self, num_waiting: int) -> None:
        """Close or open the gate by the number of connections in their handshake."""
        if not self.is_closed and num_waiting >= MOST_WAITING:
            # The kernel copies the filter.
            self.is_closed = self._set(_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(_DROP_ALL)))
            if self.is_closed and not self._was_closed:
                self._was_closed = True
                logger.warning(
                    "%d connections to %s show no key: new ones have to wait; more floods are not logged",
                    num_waiting,
                    self._listener.getsockname()[:2],
                )
        elif self.is_closed and num_waiting <= MOST_WAITING // 2:
            self.is_closed = not self._set(_DETACH_FILTER, struct.pack("i", 0))

    def _set(self, option: int, value: bytes) -> bool:
        if sys.platform != "linux":
            return False
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, option, value)
        except OSError:  # closed meanwhile, or a kernel or sandbox without filters
            return False
        return True

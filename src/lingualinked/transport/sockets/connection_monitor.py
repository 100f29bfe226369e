"""Says whether a socket's one connection over TCP has come about, and if not, why.

Knows the events of libzmq's monitor, and the errors of connecting; no messages.
"""

from __future__ import annotations

import itertools
import socket

import zmq
from zmq.utils.monitor import parse_monitor_message

CONNECT_S = 4.0
"""Seconds in which a connection over TCP comes about, or is taken to be impossible."""

_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
_PROBE_S = 0.5
_numbers = itertools.count()


class ConnectionMonitor:
    """Follows the connection of a socket, which must not be connected yet, until it has completed its handshake."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], outbox: zmq.Socket[bytes]) -> None:
        self._outbox = outbox
        self.events: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.events.linger = 0
        self._last_event = 0
        endpoint = f"inproc://lingualinked.connection-{next(_numbers)}"
        try:
            outbox.monitor(endpoint, _EVENTS)
            self.events.connect(endpoint)
        except BaseException:
            self.events.close()
            raise

    def has_connected(self) -> bool:
        """Read the events that have come; return whether the handshake has succeeded."""
        while self.events.poll(0):
            self._last_event = parse_monitor_message(self.events.recv_multipart())["event"]
            if self._last_event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
        return False

    def explain(self, address: str) -> str:
        """Say why there is no connection; for one that has had `CONNECT_S`."""
        match self._last_event:
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return "it refused the key"
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                return "what listens there has another key, or is something else"
            case zmq.EVENT_CONNECTED:
                return "it accepted the connection and showed no key"
        return _why_unreachable(address)

    def close(self) -> None:
        """Stop following; before the outbox is closed."""
        self._outbox.disable_monitor()
        self.events.close()


def _why_unreachable(address: str) -> str:
    """Try to connect, for the words of the operating system."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
    except TimeoutError:
        return "nothing answered: a firewall drops packets, or no network leads there"
    except ConnectionRefusedError:
        return "connection refused: nothing listens there, or a firewall rejects it"
    except OSError as error:
        return error.strerror or str(error)
    return "it could be reached only now"

"""Who may connect: a thread that answers the authentication requests of one ZeroMQ context (ZAP), and counts refusals.

Knows public keys only, neither names nor messages.
"""

from __future__ import annotations

import collections
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping

import zmq
from zmq.utils.monitor import parse_monitor_message

from lingualinked.transport.handshakes import EVENTS, Handshakes
from lingualinked.transport.refusals import Refusals
from lingualinked.transport.waker import Waker

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"lingualinked"
_LET_IN = b"200"
_MONITOR_ENDPOINT = "inproc://lingualinked.monitor"
_MAX_EVENTS = 100  # taken before requests are answered
_ALWAYS_LET_IN = 8  # connections of one key; a party needs one, and another after each send that was interrupted
_OPEN_PER_KEY = 4  # connections that may be open for one more to be let in; each holds memory, and a descriptor


class ZapHandler:
    """Lets holders of known keys in, until it is stopped; then it terminates the context.

    Termination has no bound of its own and waits for the thread's socket: done by the thread, it can be waited for
    with a bound. The thread holds no reference to a mailbox.

    Parameters
    ----------
    context : zmq.Context
        The context to answer for, and to terminate in the end. No socket of it may be bound before this.
    authorised : mapping of bytes to str
        Raw public keys, and the user id that frames from their holders will carry.
    refusals : Refusals
        Where to count the connections that are refused.

    References
    ----------
    `RFC 27/ZAP <https://rfc.zeromq.org/spec/27/>`_.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], authorised: Mapping[bytes, str], refusals: Refusals
    ) -> None:
        requests: zmq.Socket[bytes] = context.socket(zmq.REP)
        # As many events as its limit lie here; then libzmq's thread waits, and with it whoever floods it with connections.
        events: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        requests.linger = events.linger = 0
        self._stop = Waker()
        self._authorised = dict(authorised)  # the thread reads it; no more than one entry is changed at a time
        self._thread = threading.Thread(
            target=_serve,
            args=(context, requests, events, self._stop, self._authorised, refusals),
            name="lingualinked-zap",
            daemon=True,
        )
        try:
            requests.bind(ENDPOINT)
            events.connect(_MONITOR_ENDPOINT)
            self._thread.start()
        except BaseException:
            _end(context, requests, events, self._stop)
            raise

    def watch(self, inbox: zmq.Socket[bytes]) -> None:
        """Count connections to a socket that end without an authorised key; one socket, before it is bound."""
        inbox.monitor(_MONITOR_ENDPOINT, EVENTS)

    def authorise(self, key: bytes, user_id: str) -> None:
        """Let the holder of one more key in."""
        self._authorised[key] = user_id

    def withdraw(self, key: bytes) -> None:
        """Let the holder of a key in no more; connections that stand are not ended."""
        self._authorised.pop(key, None)

    def stop(self, timeout_s: float) -> bool:
        """End the thread and the context, whose other sockets must be closed; say whether that was done in time.

        A finalizer may find itself running in the very thread: it returns at once then.
        """
        self._stop.set()
        if self._thread is threading.current_thread():
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _serve(
    context: zmq.Context[zmq.Socket[bytes]],
    requests: zmq.Socket[bytes],
    events: zmq.Socket[bytes],
    stop: Waker,
    authorised: Mapping[bytes, str],
    refusals: Refusals,
) -> None:
    items: list[tuple[zmq.Socket[bytes] | int, int]] = [
        (each, zmq.POLLIN) for each in (requests, events, stop.fileno())
    ]
    handshakes = Handshakes()
    num_let_in: Counter[str] = collections.Counter()
    try:
        while not stop.clear():
            left_s = handshakes.next_s() - time.monotonic()
            zmq.zmq_poll(items, -1 if left_s == math.inf else max(math.ceil(left_s * 1000), 0))
            _take_events(events, handshakes)
            while requests.poll(0):  # all of them: what a connection asked before it ended is not counted again
                has_room = handshakes.num_open <= _OPEN_PER_KEY * len(authorised)
                reply = _answer(requests.recv_multipart(), authorised, num_let_in, has_room, refusals)
                if reply[2] != _LET_IN:
                    handshakes.note_known()
                requests.send_multipart(reply)
            for _ in range(handshakes.take_failed()):
                # It may be a party that ended while it connected.
                refusals.add("unknown peers", "handshake", "a connection that showed no authorised key", logging.INFO)
    finally:
        _end(context, requests, events, stop)


def _take_events(events: zmq.Socket[bytes], handshakes: Handshakes) -> None:
    """Take the events that have come, up to a limit."""
    for _ in range(_MAX_EVENTS):
        now_s = time.monotonic()  # before it is known that there are no more events
        if not events.poll(0):
            handshakes.settle(now_s)
            return
        message = parse_monitor_message(events.recv_multipart())
        handshakes.note(message["event"], message["value"], now_s)


def _end(
    context: zmq.Context[zmq.Socket[bytes]], requests: zmq.Socket[bytes], events: zmq.Socket[bytes], stop: Waker
) -> None:
    requests.close()
    events.close()
    context.term()
    stop.close()


def _answer(
    request: list[bytes],
    authorised: Mapping[bytes, str],
    num_let_in: Counter[str],
    has_room: bool,
    refusals: Refusals,
) -> list[bytes]:
    """Return the reply to one request; whatever is not known to be good is refused, and count who is let in."""
    version, request_id, domain, address, _, mechanism, *credentials = [*request, *[b""] * 6][: max(len(request), 6)]
    user_id = authorised.get(credentials[0]) if len(credentials) == 1 else None
    if user_id is None or (version, domain, mechanism) != (b"1.0", DOMAIN, b"CURVE"):
        where = address.decode(errors="replace") or "this machine"
        refusals.add(
            "unknown peers", "key", f"a connection from {where} with a key that is not authorised ({mechanism!r})"
        )
        return [b"1.0", request_id, b"400", b"not authorised", b"", b""]
    if num_let_in[user_id] >= _ALWAYS_LET_IN and not has_room:  # so that no key can keep another one out
        refusals.add("unknown peers", "connections", f"one connection too many with the key {user_id!r}")
        return [b"1.0", request_id, b"400", b"too many connections", b"", b""]
    num_let_in[user_id] += 1
    return [b"1.0", request_id, _LET_IN, b"", user_id.encode(), b""]

"""A thread that answers the authentication requests of one ZeroMQ context (ZAP), and counts refusals.

Knows public keys only, neither names nor messages.
"""

from __future__ import annotations

import collections
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import zmq
from zmq.utils.monitor import parse_monitor_message

from lingualinked.transport.sockets.gate import Gate
from lingualinked.transport.sockets.handshakes import EVENTS, Handshakes
from lingualinked.transport.sockets.waker import Waker
from lingualinked.transport.wire.refusals import Refusals

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"lingualinked"
_ACCEPTED = b"200"
_MONITOR_ENDPOINT = "inproc://lingualinked.monitor"
_MAX_EVENTS = 100  # received before requests are answered
_ALWAYS_ACCEPTED = 8  # connections of one key; a party needs one, and another after each interrupted send
_OPEN_PER_KEY = 4  # connections, on average, below which more are accepted; each holds memory and a descriptor


class ZapHandler:
    """Accepts connections from holders of authorised keys until it is stopped, then terminates the context.

    Terminating a context may block without limit. The thread does it, so that `stop` can wait with a time-out. The
    thread holds no reference to a mailbox.

    No socket of the context may be bound yet. See `RFC 27/ZAP <https://rfc.zeromq.org/spec/27/>`_.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], refusals: Refusals, open_per_key: int = _OPEN_PER_KEY
    ) -> None:
        requests: zmq.Socket[bytes] = context.socket(zmq.REP)
        # Once this socket's queue of events is full, libzmq's thread waits, and with it whoever floods it with connections.
        events: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        events.rcvhwm = 1  # beside the thousand that libzmq's end holds
        requests.linger = events.linger = 0
        self._stop = Waker()
        self._authorised: dict[bytes, str] = {}  # shared with the thread, as the gates; each change is of one entry
        self._gates: list[Gate] = []
        self._thread = threading.Thread(
            target=_serve_requests,
            args=(context, requests, events, self._stop, self._authorised, self._gates, refusals, open_per_key),
            name="lingualinked-zap",
            daemon=True,
        )
        try:
            requests.bind(ENDPOINT)
            events.connect(_MONITOR_ENDPOINT)
            self._thread.start()
        except BaseException:
            _terminate(context, requests, events, self._stop)
            raise

    def watch_handshakes(self, inbox: zmq.Socket[bytes]) -> None:
        """Count connections to a socket that end without an authorised key; for one socket, before it is bound."""
        inbox.monitor(_MONITOR_ENDPOINT, EVENTS)

    def guard(self, gate: Gate) -> None:
        """Close a gate of the watched socket while too many of its connections are in their handshake."""
        self._gates.append(gate)

    def authorise(self, key: bytes, user_id: str) -> None:
        """Accept connections from the holder of a raw public key, whose frames will carry this user id."""
        self._authorised[key] = user_id

    def withdraw(self, key: bytes) -> None:
        """Accept no new connection from the holder of a key; open ones stay."""
        self._authorised.pop(key, None)

    def stop(self, timeout_s: float) -> bool:
        """End the thread and the context, whose other sockets must be closed; return whether that was done in time.

        Returns at once if a finalizer calls it on that very thread.
        """
        self._stop.set()
        if self._thread is threading.current_thread():
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _serve_requests(
    context: zmq.Context[zmq.Socket[bytes]],
    requests: zmq.Socket[bytes],
    events: zmq.Socket[bytes],
    stop: Waker,
    authorised: Mapping[bytes, str],
    gates: Sequence[Gate],
    refusals: Refusals,
    open_per_key: int,
) -> None:
    items: list[tuple[zmq.Socket[bytes] | int, int]] = [
        (each, zmq.POLLIN) for each in (requests, events, stop.fileno())
    ]
    handshakes = Handshakes()
    num_accepted: Counter[str] = collections.Counter()
    try:
        while not stop.clear():
            left_s = handshakes.next_expiry_s() - time.monotonic()
            zmq.zmq_poll(items, -1 if left_s == math.inf else max(math.ceil(left_s * 1000), 0))
            # 1) count handshakes; strangers must not use up the descriptors
            _receive_events(events, handshakes, gates)
            # 2) answer all requests: a refused connection must be excluded before its end is counted as a failure
            while requests.poll(0):
                has_room = handshakes.num_open <= open_per_key * len(authorised)
                reply = _answer_request(requests.recv_multipart(), authorised, num_accepted, has_room, refusals)
                if reply[2] != _ACCEPTED:
                    handshakes.exclude_refused()
                requests.send_multipart(reply)
            # 3) report connections that failed without a request
            for _ in range(handshakes.pop_num_failed()):
                # Not a warning: a party may have ended while it was connecting.
                refusals.add("unknown peers", "handshake", "a connection that showed no authorised key", logging.INFO)
    finally:
        _terminate(context, requests, events, stop)


def _receive_events(events: zmq.Socket[bytes], handshakes: Handshakes, gates: Sequence[Gate]) -> None:
    """Record the events that have come, up to a limit, and adjust the gates to each."""
    for _ in range(_MAX_EVENTS):
        now_s = time.monotonic()  # read before the poll, so that later events can't be missed
        has_event = bool(events.poll(0))
        if has_event:
            message = parse_monitor_message(events.recv_multipart())
            handshakes.record_event(message["event"], message["value"], now_s)
        else:
            handshakes.expire_undecided(now_s)
        for gate in gates:
            gate.adjust(handshakes.num_waiting)
        if not has_event:
            return


def _terminate(
    context: zmq.Context[zmq.Socket[bytes]], requests: zmq.Socket[bytes], events: zmq.Socket[bytes], stop: Waker
) -> None:
    requests.close()
    events.close()
    context.term()
    stop.close()


def _answer_request(
    request: list[bytes],
    authorised: Mapping[bytes, str],
    num_accepted: Counter[str],
    has_room: bool,
    refusals: Refusals,
) -> list[bytes]:
    """Return the reply to one request, counting accepted connections; anything unexpected is refused."""
    version, request_id, domain, address, _, mechanism, *credentials = [*request, *[b""] * 6][: max(len(request), 6)]
    user_id = authorised.get(credentials[0]) if len(credentials) == 1 else None
    if user_id is None or (version, domain, mechanism) != (b"1.0", DOMAIN, b"CURVE"):
        where = address.decode(errors="replace") or "this machine"
        refusals.add(
            "unknown peers", "key", f"a connection from {where} with a key that is not authorised ({mechanism!r})"
        )
        return [b"1.0", request_id, b"400", b"not authorised", b"", b""]
    if num_accepted[user_id] >= _ALWAYS_ACCEPTED and not has_room:  # so that no key can lock out another
        refusals.add("unknown peers", "connections", f"too many connections with the key {user_id!r}")
        return [b"1.0", request_id, b"400", b"too many connections", b"", b""]
    num_accepted[user_id] += 1
    return [b"1.0", request_id, _ACCEPTED, b"", user_id.encode(), b""]

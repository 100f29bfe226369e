"""Failed handshakes are counted, although an event of success does not name its connection."""

from __future__ import annotations

import math
import random

import zmq

from lingualinked.transport.sockets.handshakes import Handshakes


def test_what_ends_alone_is_counted_at_once() -> None:
    handshakes = Handshakes()
    assert handshakes.next_expiry_s() == math.inf
    handshakes.record_event(zmq.EVENT_ACCEPTED, 7, 0.0)
    assert handshakes.pop_num_failed() == 0
    handshakes.record_event(zmq.EVENT_DISCONNECTED, 7, 0.1)
    assert (handshakes.pop_num_failed(), handshakes.pop_num_failed(), handshakes.next_expiry_s()) == (1, 0, math.inf)


def test_what_ends_after_its_handshake_is_not_counted() -> None:
    handshakes = Handshakes()
    for event in (zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED):
        handshakes.record_event(event, 7, 0.0)
    assert handshakes.pop_num_failed() == 0


def test_connections_are_open_from_their_acceptance_to_their_end() -> None:
    handshakes, seen = Handshakes(), []
    for event in (zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_ACCEPTED, zmq.EVENT_DISCONNECTED):
        handshakes.record_event(event, 7, 0.0)
        seen.append(handshakes.num_open)
    assert seen == [1, 1, 2, 1]


def test_what_was_counted_elsewhere_is_not_counted() -> None:
    handshakes = Handshakes()
    handshakes.record_event(zmq.EVENT_ACCEPTED, 7, 0.0)
    handshakes.exclude_refused()
    handshakes.record_event(zmq.EVENT_DISCONNECTED, 7, 0.0)
    assert handshakes.pop_num_failed() == 0


def test_any_mixture_is_counted_exactly_in_the_end_and_never_too_high() -> None:
    """Descriptors are reused; connections may stay open after success, and before failure."""
    chance = random.Random(0)
    handshakes = Handshakes()
    in_handshake: dict[int, float] = {}
    standing: set[int] = set()
    num_failed = num_counted = 0
    now_s = 0.0
    for _ in range(5_000):
        now_s += chance.random() / 10
        late = [fd for fd, began_s in in_handshake.items() if now_s - began_s > 1.9]
        if not late and len(in_handshake) + len(standing) < 10 and chance.random() < 0.5:
            fd = next(fd for fd in range(10) if fd not in in_handshake and fd not in standing)
            in_handshake[fd] = now_s
            handshakes.record_event(zmq.EVENT_ACCEPTED, fd, now_s)
        elif late or (in_handshake and chance.random() < 0.7):
            fd = late[0] if late else chance.choice(sorted(in_handshake))
            del in_handshake[fd]
            if chance.random() < 0.5:
                standing.add(fd)
                handshakes.record_event(zmq.EVENT_HANDSHAKE_SUCCEEDED, 0, now_s)
            else:
                num_failed += 1
                handshakes.record_event(zmq.EVENT_DISCONNECTED, fd, now_s)
        elif standing:
            fd = chance.choice(sorted(standing))
            standing.remove(fd)
            handshakes.record_event(zmq.EVENT_DISCONNECTED, fd, now_s)
        handshakes.expire_undecided(now_s)
        num_counted += handshakes.pop_num_failed()
        assert num_counted <= num_failed
    for fd in in_handshake:
        handshakes.record_event(zmq.EVENT_DISCONNECTED, fd, now_s)
    assert standing
    assert num_counted > 0
    assert handshakes.next_expiry_s() <= now_s + 3
    handshakes.expire_undecided(now_s + 3)
    assert num_counted + handshakes.pop_num_failed() == num_failed + len(in_handshake)

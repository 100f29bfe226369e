"""Measures the links to other parties, from the times between messages and their answers.

Knows peers and a clock; the worker's loop passes the answers to it.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

import torch

from lingualinked.protocol.measuring import LinkProbed, Ping, Pong, ProbeLink
from lingualinked.worker.messaging.peers import Peers


class _LinkProbe:
    """The measurement of one link."""

    def __init__(self, request: ProbeLink, peers: Peers) -> None:
        self._request = request
        self._peers = peers
        self._seconds: list[float] = []
        self._sent_s = 0.0

    def send_next_ping(self) -> None:
        """Send the next ``Ping``."""
        number = len(self._seconds)
        payload = torch.zeros(self._request.sizes[number], dtype=torch.uint8)
        self._sent_s = time.perf_counter()
        self._peers.send(self._request.target, Ping(number=number), (payload,))

    def receive_pong(self, pong: Pong) -> LinkProbed | None:
        """Record an answer and send the next ``Ping``; return the times after the last one."""
        if pong.number != len(self._seconds):
            return None
        self._seconds.append(time.perf_counter() - self._sent_s)
        if len(self._seconds) < len(self._request.sizes):
            self.send_next_ping()
            return None
        return LinkProbed(request=self._request.request, seconds=tuple(self._seconds))


class LinkProbes:
    """All links that one worker measures; measurements of one link run one after another, so as not to disturb each other."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._waiting: defaultdict[str, deque[_LinkProbe]] = defaultdict(deque)  # by target

    @property
    def targets(self) -> set[str]:
        """The parties with an unanswered ``Ping``."""
        return {target for target, waiting in self._waiting.items() if waiting}

    def start_probe(self, request: ProbeLink) -> None:
        """Measure a link, after earlier measurements of it; raise PeerUnknownError if the target was not introduced."""
        waiting = self._waiting[request.target]
        waiting.append(_LinkProbe(request, self._peers))
        if len(waiting) == 1:
            waiting[0].send_next_ping()

    def receive(self, message: Ping | Pong, sender: str, report: Callable[[LinkProbed], None]) -> None:
        """Answer a party that measures the link to this worker, or record a target's answer; report after the last one."""
        if isinstance(message, Ping):
            self._peers.send(sender, Pong(number=message.number))
            return
        waiting = self._waiting[sender]
        answer = waiting[0].receive_pong(message)
        if answer is not None:
            waiting.popleft()
            if waiting:
                waiting[0].send_next_ping()
            report(answer)

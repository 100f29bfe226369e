"""Measures the links to other parties: messages there, and answers back.

Knows peers and a clock; the worker's loop hands it the answers.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque

import torch

from lingualinked.protocol.measuring import LinkProbed, Ping, Pong, ProbeLink
from lingualinked.worker.peers import Peers


class _LinkProbe:
    """One link that is being measured.

    Parameters
    ----------
    request : ProbeLink
        Whom to send to, and what.
    peers : Peers
        Sends to the target.
    """

    def __init__(self, request: ProbeLink, peers: Peers) -> None:
        self._request = request
        self._peers = peers
        self._seconds: list[float] = []
        self._sent_s = 0.0

    def send(self) -> None:
        """Send the next message."""
        number = len(self._seconds)
        payload = torch.zeros(self._request.sizes[number], dtype=torch.uint8)
        self._sent_s = time.perf_counter()
        self._peers.send(self._request.target, Ping(number=number), (payload,))

    def take(self, pong: Pong) -> LinkProbed | None:
        """Note an answer and go on; give the times once all have come."""
        if pong.number != len(self._seconds):
            return None
        self._seconds.append(time.perf_counter() - self._sent_s)
        if len(self._seconds) < len(self._request.sizes):
            self.send()
            return None
        return LinkProbed(request=self._request.request, seconds=tuple(self._seconds))


class LinkProbes:
    """All links that one worker measures; those to one party one after the other: two would measure each other.

    Parameters
    ----------
    peers : Peers
        Whom they lead to.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._waiting: defaultdict[str, deque[_LinkProbe]] = defaultdict(deque)  # by target

    @property
    def targets(self) -> set[str]:
        """Who was sent a ``Ping`` that is not answered yet."""
        return {target for target, waiting in self._waiting.items() if waiting}

    def begin(self, request: ProbeLink) -> None:
        """Measure a link, now or when the one before it is done.

        Raises
        ------
        PeerUnknownError
            If the target has not been introduced.
        """
        waiting = self._waiting[request.target]
        waiting.append(_LinkProbe(request, self._peers))
        if len(waiting) == 1:
            waiting[0].send()

    def answer(self, ping: Ping, sender: str) -> None:
        """Answer another party, which measures the link to here."""
        self._peers.send(sender, Pong(number=ping.number))

    def take(self, pong: Pong, sender: str) -> LinkProbed | None:
        """Note an answer of a target; give the times once all of a link have come."""
        waiting = self._waiting[sender]
        answer = waiting[0].take(pong)
        if answer is not None:
            waiting.popleft()
            if waiting:
                waiting[0].send()
        return answer

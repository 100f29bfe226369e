"""Measures the links to other parties: messages there, and answers back.

Knows one mailbox and a clock; the worker's loop hands it the answers.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque

import torch

from lingualinked.errors import ProtocolError
from lingualinked.protocol.messages import LinkProbed, Ping, Pong, ProbeLink, encode
from lingualinked.transport.mailbox import Mailbox


class _LinkProbe:
    """One link that is being measured.

    Parameters
    ----------
    request : ProbeLink
        Whom to send to, and what.
    mailbox : Mailbox
        Connected to the target.
    public_key : str
        Of the mailbox, for the answers.
    """

    def __init__(self, request: ProbeLink, mailbox: Mailbox, public_key: str) -> None:
        self._request = request
        self._mailbox = mailbox
        self._public_key = public_key
        self._seconds: list[float] = []
        self._sent_s = 0.0

    def send(self) -> None:
        """Send the next message."""
        number = len(self._seconds)
        ping = Ping(number=number, address=self._mailbox.address, key=self._public_key)
        payload = torch.zeros(self._request.sizes[number], dtype=torch.uint8)
        self._sent_s = time.perf_counter()
        self._mailbox.send(self._request.target, encode(ping), (payload,))

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
    mailbox : Mailbox
        The worker's.
    public_key : str
        Of the mailbox, for the answers.
    """

    def __init__(self, mailbox: Mailbox, public_key: str) -> None:
        self._mailbox = mailbox
        self._public_key = public_key
        self._waiting: defaultdict[str, deque[_LinkProbe]] = defaultdict(deque)  # by target

    def begin(self, request: ProbeLink) -> None:
        """Measure a link, now or when the one before it is done.

        Raises
        ------
        ArgumentError
            If the target can't be connected to.
        """
        self._mailbox.connect(request.target, request.address, request.key)
        waiting = self._waiting[request.target]
        waiting.append(_LinkProbe(request, self._mailbox, self._public_key))
        if len(waiting) == 1:
            waiting[0].send()

    def answer(self, ping: Ping, sender: str) -> None:
        """Answer another party, which measures the link to here."""
        self._mailbox.connect(sender, ping.address, ping.key)
        self._mailbox.send(sender, encode(Pong(number=ping.number)))

    def take(self, pong: Pong, sender: str) -> LinkProbed | None:
        """Note an answer; give the times once all of a link have come.

        Raises
        ------
        ProtocolError
            If the sender was not asked.
        """
        waiting = self._waiting[sender]
        if not waiting:
            raise ProtocolError(f"a Pong of {sender!r}, which was sent no Ping")
        answer = waiting[0].take(pong)
        if answer is not None:
            waiting.popleft()
            if waiting:
                waiting[0].send()
        return answer

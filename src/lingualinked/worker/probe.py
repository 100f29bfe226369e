"""Measures the link to another party: messages there, and answers back.

Knows one mailbox and a clock; the worker's loop hands it the answers.
"""

from __future__ import annotations

import time

import torch

from lingualinked.protocol.messages import LinkProbed, Ping, Pong, ProbeLink, encode
from lingualinked.transport.mailbox import Mailbox


class LinkProbe:
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

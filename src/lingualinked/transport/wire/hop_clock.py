"""Splits the delay of a message into travel and waiting, from the sender's clock.

Knows numbers only.
"""

from __future__ import annotations

import time
from collections import defaultdict

_WRAP_US = 2**32
_WINDOW = 32  # messages; the shortest delay of this window and the last one counts


def clock_us() -> int:
    """Return the microseconds of this machine's monotonic clock, modulo 2^32."""
    return time.monotonic_ns() // 1000 % _WRAP_US


class HopClock:
    """Splits the delay of each message into travel and waiting.

    The shortest recent delay belongs to a message that did not wait, and includes the offset between the two clocks;
    anything beyond it is waiting. Processes of one machine share one clock. Between machines the offset is not known, and so
    the travel is not either. This is the queuing delay of S. Shalunov et al., "Low Extra Delay Background Transport
    (LEDBAT)", RFC 6817.
    """

    def __init__(self) -> None:
        self._shortest: defaultdict[str, list[int]] = defaultdict(list)  # in this window and in the last one
        self._count: defaultdict[str, int] = defaultdict(int)

    def split_delay(
        self, sender: str, sent_us: int, due_s: float, decode_s: float = 0.0, *, same_host: bool = True
    ) -> tuple[int | None, int]:
        """Return the microseconds that a message travelled, if known, and those that it has waited here until now.

        `sent_us` is the sender's `clock_us` when it sent the message. `due_s` is when the message was due on an emulated
        link (monotonic seconds), which gives both exactly; 0 on other links, where decoding the message, which took
        `decode_s`, is neither.
        """
        now_us = clock_us()
        delay_us = (now_us - sent_us + _WRAP_US // 2) % _WRAP_US - _WRAP_US // 2
        if due_s:
            wait_us = max(0, round((time.monotonic() - due_s) * 1e6))
            return max(0, delay_us - wait_us), wait_us
        delay_us -= round(decode_s * 1e6)
        if self._count[sender] % _WINDOW == 0:
            self._shortest[sender] = [delay_us, *self._shortest[sender][:1]]
        self._count[sender] += 1
        recent = self._shortest[sender]
        recent[0] = min(recent[0], delay_us)
        hop_us = min(recent)
        return max(0, hop_us) if same_host else None, max(0, delay_us - hop_us)

"""How long messages are on their way, and how long they wait, told by what the sender's clock said.

Knows numbers only.
"""

from __future__ import annotations

import time
from collections import defaultdict

_WRAP_US = 2**32
_WINDOW = 32  # messages whose shortest delay counts, twice


def clock_us() -> int:
    """Microseconds of this machine's monotonic clock, which starts anew every 2^32 of them."""
    return time.monotonic_ns() // 1000 % _WRAP_US


class HopClock:
    """Parts the delay of each message into its way and its wait.

    The shortest delay of late is that of a message that did not wait, plus what the two clocks differ by; whatever a
    delay has beyond it is waiting. On one machine the clocks are one.

    References
    ----------
    S. Shalunov et al., "Low Extra Delay Background Transport (LEDBAT)", RFC 6817, whose queuing delay is this.
    """

    def __init__(self) -> None:
        self._shortest: defaultdict[str, list[int]] = defaultdict(list)  # this window's and the last one's
        self._count: defaultdict[str, int] = defaultdict(int)

    def part(self, sender: str, sent_us: int, due_s: float) -> tuple[int, int]:
        """Give the microseconds that a message of a sender was on its way, and those that it waited here until now.

        Parameters
        ----------
        sender : str
            Who sent it.
        sent_us : int
            What its clock said (`clock_us`).
        due_s : float
            When it was due on a link that is emulated (monotonic seconds), which tells both exactly; 0 on others.
        """
        now_us = clock_us()
        delay_us = (now_us - sent_us + _WRAP_US // 2) % _WRAP_US - _WRAP_US // 2
        if due_s:
            wait_us = max(0, round((time.monotonic() - due_s) * 1e6))
            return max(0, delay_us - wait_us), wait_us
        if self._count[sender] % _WINDOW == 0:
            self._shortest[sender] = [delay_us, *self._shortest[sender][:1]]
        self._count[sender] += 1
        recent = self._shortest[sender]
        recent[0] = min(recent[0], delay_us)
        hop_us = min(recent)
        return max(0, hop_us), max(0, delay_us - hop_us)

"""Makes a worker as slow as the device that it emulates.

Knows CPU time; not what is computed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Start:
    """When something began: on the wall's clock, and on that of the CPU."""

    wall_s: float
    cpu_s: float


class Pace:
    """Stretches computing in proportion to the CPU time that it took.

    Not to the wall's time: that would amplify whatever else the machine does meanwhile.

    Parameters
    ----------
    threads : int
        That compute; their CPU time is taken as spread evenly.
    slowdown : float
        How many times slower than this machine.
    """

    def __init__(self, threads: int, slowdown: float) -> None:
        self.slowdown = slowdown
        self._threads = threads

    def start(self) -> Start:
        """Note when something begins."""
        return Start(time.perf_counter(), self._cpu_s())

    def finish(self, start: Start) -> float:
        """Rest as long as the emulated device would go on computing; give the seconds since the start."""
        if self.slowdown > 1:
            rest_s = (self.slowdown - 1) * (self._cpu_s() - start.cpu_s)
            time.sleep(rest_s)
        return time.perf_counter() - start.wall_s

    def clock(self) -> float:
        """Give the seconds of a clock that runs as the emulated device computes; only differences mean something."""
        return self.slowdown * self._cpu_s() if self.slowdown > 1 else time.perf_counter()

    def _cpu_s(self) -> float:
        # With one thread, that of this thread alone: those that carry messages are not slowed.
        return time.thread_time() if self._threads == 1 else time.process_time() / self._threads

"""Makes a worker as slow as the device that it emulates.

Knows CPU time; not what is computed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimerStart:
    """When a timer was started, in wall-clock time and in CPU time."""

    wall_s: float
    cpu_s: float


class Pace:
    """Stretches computing in proportion to its CPU time, which is assumed to be spread evenly over the threads.

    Not to its wall-clock time: that would amplify whatever else the machine does meanwhile.
    """

    def __init__(self, threads: int, slowdown: float) -> None:
        self.slowdown = slowdown
        self._threads = threads

    def start_timer(self) -> TimerStart:
        """Start timing a computation."""
        return TimerStart(time.perf_counter(), self._cpu_s())

    def finish_timer(self, start: TimerStart) -> float:
        """Sleep as long as the emulated device would still compute; return the seconds since the start."""
        if self.slowdown > 1:
            rest_s = (self.slowdown - 1) * (self._cpu_s() - start.cpu_s)
            time.sleep(rest_s)
        return time.perf_counter() - start.wall_s

    def skip_pause(self, start: TimerStart, pause: TimerStart) -> TimerStart:
        """Return the start of a timer that has not counted what has passed since a pause began."""
        wall_s, cpu_s = time.perf_counter() - pause.wall_s, self._cpu_s() - pause.cpu_s
        return TimerStart(start.wall_s + wall_s, start.cpu_s + cpu_s)

    def emulated_clock_s(self) -> float:
        """Return the seconds of a clock that runs at the emulated device's speed; only differences are meaningful."""
        return self.slowdown * self._cpu_s() if self.slowdown > 1 else time.perf_counter()

    def _cpu_s(self) -> float:
        # With one thread, of this thread only: threads that carry messages are not slowed.
        return time.thread_time() if self._threads == 1 else time.process_time() / self._threads

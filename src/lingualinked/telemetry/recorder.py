"""Records what happens in a running pipeline: recent events in full, and totals of everything.

Knows neither who reports events nor who reads them.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque

from lingualinked.errors import ArgumentError
from lingualinked.quantities import count_text
from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.history import Counters, DeviceCounters, History, StepCounters
from lingualinked.telemetry.samples import DeviceSample, StepSample


class Recorder:
    """A bounded history of one pipeline; all methods are thread-safe. ``start_s`` is on the caller's monotonic clock."""

    def __init__(
        self,
        *,
        max_steps: int = 10_000,
        max_device_samples: int = 10_000,
        max_decisions: int = 10_000,
        max_migrations: int = 1_000,
        start_s: float | None = None,
    ) -> None:
        for bound in (max_steps, max_device_samples, max_decisions, max_migrations):
            if bound < 0:
                raise ArgumentError(f"a history can't keep {count_text(bound, 'sample')}: give 0 or more")
        self._start_s = time.monotonic() if start_s is None else start_s
        self._lock = threading.Lock()
        self._steps: deque[StepSample] = deque(maxlen=max_steps)
        self._device_samples: deque[DeviceSample] = deque(maxlen=max_device_samples)
        self._decisions: deque[Decision] = deque(maxlen=max_decisions)
        self._migrations: deque[Migration] = deque(maxlen=max_migrations)
        self._decode = _StepTotals()
        self._prefill = _StepTotals()
        self._devices: dict[str, _DeviceTotals] = {}
        self._num_moves = self._num_stays = 0
        self._num_migrations = self._num_failed_migrations = self._num_moved_layers = 0
        self._stall_s = 0.0

    def add_step(self, sample: StepSample) -> None:
        """Record a completed step."""
        with self._lock:
            self._steps.append(sample)
            tokens = sample.tokens
            kind = self._decode if tokens == 1 else self._prefill
            kind.num_steps += 1
            kind.num_tokens += sample.rows * tokens
            kind.total_s += sample.total_s
            devices = self._devices
            for stage in sample.stages:
                totals = devices.get(stage.device)
                if totals is None:
                    totals = devices[stage.device] = _DeviceTotals()
                totals.num_visits += 1
                totals.hop_s += stage.hop_s
                totals.wait_s += stage.wait_s
                totals.compute_s += stage.compute_s
                totals.codec_s += stage.codec_s
                totals.sent_bytes += stage.sent_bytes

    def steps_since(self, number: int) -> tuple[int, list[StepSample]]:
        """Return the number of steps so far, and the steps after a given number that are still in the history, oldest first."""
        with self._lock:
            count = self._decode.num_steps + self._prefill.num_steps
            num_new = min(count - number, len(self._steps))
            newest = list(itertools.islice(reversed(self._steps), num_new))
        return count, newest[::-1]

    def add_device(self, sample: DeviceSample) -> None:
        """Record a sample of a device."""
        with self._lock:
            self._device_samples.append(sample)

    def add_decision(self, decision: Decision) -> None:
        """Record a decision."""
        with self._lock:
            self._decisions.append(decision)
            if decision.dry_run:
                return
            if decision.action == "move":
                self._num_moves += 1
            else:
                self._num_stays += 1

    def complete_decision(self, decision: Decision, done: Decision) -> None:
        """Replace a recorded decision by the same one with its migrations."""
        with self._lock:
            for index in reversed(range(len(self._decisions))):
                if self._decisions[index] is decision:
                    self._decisions[index] = done
                    return

    def add_migration(self, migration: Migration) -> None:
        """Record a completed or failed migration."""
        num_moved_layers = sum(move.end - move.start for move in migration.moves)
        with self._lock:
            self._migrations.append(migration)
            self._stall_s += migration.longest_stall_s
            if migration.succeeded:
                self._num_migrations += 1
                self._num_moved_layers += num_moved_layers
            else:
                self._num_failed_migrations += 1

    def history(self) -> History:
        """Return a snapshot of the history, which does not change later."""
        with self._lock:
            return History(
                start_s=self._start_s,
                steps=tuple(self._steps),
                devices=tuple(self._device_samples),
                decisions=tuple(self._decisions),
                migrations=tuple(self._migrations),
                counters=Counters(
                    decode=self._decode.frozen(),
                    prefill=self._prefill.frozen(),
                    devices={device: totals.frozen() for device, totals in self._devices.items()},
                    num_moves=self._num_moves,
                    num_stays=self._num_stays,
                    num_migrations=self._num_migrations,
                    num_failed_migrations=self._num_failed_migrations,
                    num_moved_layers=self._num_moved_layers,
                    stall_s=self._stall_s,
                ),
            )


class _StepTotals:
    """Totals of one kind of step; mutable, because every step updates them."""

    __slots__ = ("num_steps", "num_tokens", "total_s")

    def __init__(self) -> None:
        self.num_steps = self.num_tokens = 0
        self.total_s = 0.0

    def frozen(self) -> StepCounters:
        return StepCounters(num_steps=self.num_steps, num_tokens=self.num_tokens, total_s=self.total_s)


class _DeviceTotals:
    """Totals of one device; mutable."""

    __slots__ = ("codec_s", "compute_s", "hop_s", "num_visits", "sent_bytes", "wait_s")

    def __init__(self) -> None:
        self.num_visits = self.sent_bytes = 0
        self.hop_s = self.wait_s = self.compute_s = self.codec_s = 0.0

    def frozen(self) -> DeviceCounters:
        return DeviceCounters(
            num_visits=self.num_visits,
            hop_s=self.hop_s,
            wait_s=self.wait_s,
            compute_s=self.compute_s,
            codec_s=self.codec_s,
            sent_bytes=self.sent_bytes,
        )

"""Records what happens in a running pipeline: recent events in full, and totals of everything.

Knows neither who reports events nor who reads them.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import deque
from types import SimpleNamespace

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
        self._start_s = time.monotonic() if start_s is None else start_s
        self._lock = threading.Lock()
        self._steps: deque[StepSample] = deque(maxlen=max_steps)
        self._device_samples: deque[DeviceSample] = deque(maxlen=max_device_samples)
        self._decisions: deque[Decision] = deque(maxlen=max_decisions)
        self._migrations: deque[Migration] = deque(maxlen=max_migrations)
        self._decode, self._prefill = _mutable(StepCounters()), _mutable(StepCounters())
        self._devices: dict[str, SimpleNamespace] = {}
        self._others = Counters()  # of what is seldom: decisions and migrations

    def add_step(self, sample: StepSample) -> None:
        """Record a completed step."""
        with self._lock:
            self._steps.append(sample)
            kind = self._decode if sample.is_decode else self._prefill
            kind.num_steps += 1
            kind.num_tokens += sample.rows * sample.tokens
            kind.total_s += sample.total_s
            for stage in sample.stages:
                totals = self._devices.get(stage.device)
                if totals is None:
                    totals = self._devices[stage.device] = _mutable(DeviceCounters())
                totals.num_visits += 1
                totals.hop_s += stage.hop_s
                totals.wait_s += stage.wait_s
                totals.compute_s += stage.compute_s
                totals.codec_s += stage.codec_s
                totals.sent_bytes += stage.sent_bytes

    def steps_since(self, number: int) -> tuple[int, list[StepSample]]:
        """Return the number of steps so far, and the steps after a given number that are still in the history, oldest first."""
        with self._lock:
            count: int = self._decode.num_steps + self._prefill.num_steps
            num_new = min(count - number, len(self._steps))
            newest = list(itertools.islice(reversed(self._steps), num_new))
        return count, newest[::-1]

    def latest_steps(self, most: int) -> list[StepSample]:
        """Return the latest steps, up to a number of them, oldest first."""
        with self._lock:
            return [*itertools.islice(reversed(self._steps), most)][::-1]

    def add_device(self, sample: DeviceSample) -> None:
        """Record a sample of a device."""
        with self._lock:
            self._device_samples.append(sample)

    def add_decision(self, decision: Decision) -> None:
        """Record a decision."""
        with self._lock:
            self._decisions.append(decision)
            if not decision.dry_run:
                self._count(num_moves=decision.action == "move", num_stays=decision.action == "stay")

    def complete_decision(self, decision: Decision, done: Decision) -> None:
        """Replace a recorded decision by the same one with its migrations."""
        with self._lock:
            for index in reversed(range(len(self._decisions))):
                if self._decisions[index] is decision:
                    self._decisions[index] = done
                    return

    def add_migration(self, migration: Migration) -> None:
        """Record a completed or failed migration."""
        num_layers = sum(move.end - move.start for move in migration.moves)
        with self._lock:
            self._migrations.append(migration)
            self._count(
                num_migrations=migration.succeeded,
                num_failed_migrations=not migration.succeeded,
                num_moved_layers=num_layers * migration.succeeded,
                stall_s=migration.longest_stall_s,
            )

    def history(self) -> History:
        """Return a snapshot of the history, which does not change later."""
        with self._lock:
            return History(
                start_s=self._start_s,
                steps=tuple(self._steps),
                devices=tuple(self._device_samples),
                decisions=tuple(self._decisions),
                migrations=tuple(self._migrations),
                counters=dataclasses.replace(
                    self._others,
                    decode=StepCounters(**vars(self._decode)),
                    prefill=StepCounters(**vars(self._prefill)),
                    devices={device: DeviceCounters(**vars(totals)) for device, totals in self._devices.items()},
                ),
            )

    def _count(self, **added: float) -> None:
        totals = {name: getattr(self._others, name) + number for name, number in added.items()}
        self._others = dataclasses.replace(self._others, **totals)


def _mutable(totals: StepCounters | DeviceCounters) -> SimpleNamespace:
    """Return counters that every step can add to, faster than new ones can be made."""
    return SimpleNamespace(**dataclasses.asdict(totals))

"""A snapshot of a model's stages and the workers that host them, with the history that led there.

Knows how to describe itself, not how it was measured.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingualinked.pretty import pretty_text
from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.history import Counters, History
from lingualinked.telemetry.perfetto import write_trace
from lingualinked.telemetry.plain import plain
from lingualinked.telemetry.prometheus import prometheus_text
from lingualinked.telemetry.samples import DeviceSample, StepSample

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageSnapshot:
    """One stage as its worker reports it.

    Parameters
    ----------
    device : str
        Name of the device that hosts it.
    start, end : int
        Its half-open layer range.
    weight_bytes, kv_bytes : int
        Bytes of its weights, and of the KV cache that it holds for live sessions.
    num_sessions, num_steps : int
        Sessions that hold KV now, and steps run since it was loaded.
    compute_s : float
        Seconds spent computing those steps.
    sent_bytes : int
        Bytes sent to the next stage (or, from the last one, to the caller) before encryption.
    """

    device: str
    start: int
    end: int
    weight_bytes: int
    kv_bytes: int
    num_sessions: int
    num_steps: int
    compute_s: float
    sent_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One worker process.

    Parameters
    ----------
    device : str
        Name of its device.
    pid : int
        Process id.
    threads : int
        Threads that it computes with.
    resident_bytes, idle_resident_bytes : int
        Resident memory now, and when it had started and held nothing.
    num_refused : int
        Messages that it refused as malformed, unknown or late, and connections that showed no authorised key.
    """

    device: str
    pid: int
    threads: int
    resident_bytes: int
    idle_resident_bytes: int
    num_refused: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What a model's pipeline is doing, and what it has done: a picture of one moment that does not change any more.

    Parameters
    ----------
    stages : tuple of StageSnapshot
        In pipeline order.
    workers : tuple of WorkerSnapshot
        The workers that host them, each once.
    history : History
        Recent steps, looks at devices, decisions and migrations, and totals since the pipeline was started.
    """

    stages: tuple[StageSnapshot, ...]
    workers: tuple[WorkerSnapshot, ...]
    history: History = dataclasses.field(default_factory=History)

    @property
    def steps(self) -> tuple[StepSample, ...]:
        """Recent steps with the timings of every stage, oldest first."""
        return self.history.steps

    @property
    def device_samples(self) -> tuple[DeviceSample, ...]:
        """Recent looks at devices: memory, CPU, temperature, battery; oldest first."""
        return self.history.devices

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What was decided about moving layers, ``"stay"`` too, with the numbers; oldest first."""
        return self.history.decisions

    @property
    def migrations(self) -> tuple[Migration, ...]:
        """Layers moved while the pipeline ran, and attempts at it; oldest first."""
        return self.history.migrations

    @property
    def counters(self) -> Counters:
        """Totals since the pipeline was started, beyond what is remembered of single steps."""
        return self.history.counters

    def tokens_per_s(self, window_s: float = 10.0) -> float:
        """Return the new tokens per second, over all rows and sessions, in the seconds before the last step came back."""
        return self.history.tokens_per_s(window_s)

    def utilisation(self, window_s: float = 10.0) -> dict[str, float]:
        """Return the share of time that each device was busy, in the seconds before the last step came back."""
        return self.history.utilisation(window_s)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as nested plain Python data, ready for JSON."""
        return plain(self)

    def to_pandas(self) -> pd.DataFrame:
        """Return a row per step and stage (needs pandas: ``pip install lingualinked[pandas]``).

        Returns
        -------
        pandas.DataFrame
            The step's ``time_s``, ``session``, ``number``, ``plan_version``, ``rows``, ``tokens``, ``context`` and
            ``total_s``, the stage's position ``stage``, and its ``device``, ``start``, ``end``, ``hop_s``, ``wait_s``,
            ``compute_s``, ``codec_s`` and ``sent_bytes``.

        Raises
        ------
        ArgumentError
            If pandas is not installed.
        """
        from lingualinked.display.frame import steps_frame  # as with pictures: plain data calls what knows the library

        return steps_frame(self.steps)

    def to_perfetto(self, path: str | os.PathLike[str]) -> Path:
        """Write a timeline for https://ui.perfetto.dev: a track per stage, arrows for hops, migrations and decisions.

        Parameters
        ----------
        path : path-like
            JSON file to write; one that is there is replaced.

        Returns
        -------
        Path
            The file.
        """
        return write_trace(self.history, path)

    def prometheus(self) -> str:
        """Return totals and the present state in Prometheus' text format, to be served to its scraper."""
        return prometheus_text(self)

    def plot(self, last_s: float | None = None) -> Figure:
        """Draw stage times, utilisation and tokens per second over time, with the migrations marked.

        Before the first step, memory and compute time per stage. Needs matplotlib: ``pip install lingualinked[plot]``.

        Parameters
        ----------
        last_s : float, optional
            Seconds before the last step came back to draw; ``None``: all that is remembered.

        Raises
        ------
        ArgumentError
            If matplotlib is not installed, or `last_s` is not above 0.
        """
        from lingualinked.display.telemetry import telemetry_figure  # plain data that can be drawn

        return telemetry_figure(self, last_s)

    _repr_pretty_ = pretty_text

    def __str__(self) -> str:
        from lingualinked.display.telemetry import telemetry_text

        return telemetry_text(self)

    def _repr_html_(self) -> str:
        from lingualinked.display.telemetry import telemetry_html

        return telemetry_html(self)

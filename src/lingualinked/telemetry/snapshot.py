"""A snapshot of a model's stages and the workers that host them, with the history that led there.

Knows how to describe itself, not how it was measured.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingualinked.errors import ClosedError
from lingualinked.registry import figure_of, frame_of
from lingualinked.shown import Shown
from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.history import Counters, History
from lingualinked.telemetry.metrics import Reading, metrics_text
from lingualinked.telemetry.perfetto import write_trace
from lingualinked.telemetry.plain import plain
from lingualinked.telemetry.reports import StageSnapshot, WorkerSnapshot
from lingualinked.telemetry.samples import DeviceSample, StepSample

if TYPE_CHECKING:
    from lingualinked.telemetry.endpoint import MetricsEndpoint

    LiveServe = Callable[[], Callable[[int, str], MetricsEndpoint] | None]  # a reference that keeps no model alive


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry(Shown):
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
    _live: LiveServe | None = dataclasses.field(default=None, repr=False, compare=False)

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
        data = plain(dataclasses.replace(self, _live=None))
        del data["_live"]
        return data

    def to_pandas(self) -> Any:
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
        return frame_of(self)

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
        """Return totals and the present state in Prometheus' text format (needs ``pip install lingualinked[metrics]``).

        Raises
        ------
        ArgumentError
            If prometheus_client is not installed.
        """
        return metrics_text(Reading(stages=self.stages, workers=self.workers, history=self.history))

    def serve(self, port: int, address: str = "127.0.0.1") -> MetricsEndpoint:
        """Serve the running model's metrics to Prometheus over HTTP (needs ``pip install lingualinked[metrics]``).

        Each scrape asks the workers anew, for 5 s at most; ``lingualinked_up`` says whether all have answered. The endpoint
        ends with the model, or its cluster; nobody has to keep it. A model can be served at several ports.

        Parameters
        ----------
        port : int
            Where to listen; 0: a port that is free, which the endpoint names.
        address : str
            Of this machine. Whoever reaches it can read the metrics: names of devices and figures, never text or tokens.

        Returns
        -------
        MetricsEndpoint
            With its ``url`` and ``close()``; also a context manager.

        Raises
        ------
        ArgumentError
            If it can't listen there, or prometheus_client is not installed.
        ClosedError
            If the model is closed, or this telemetry was taken of none that runs here.
        UnsupportedOperationError
            In a forked child of the process that made the cluster.
        ResourceError
            If no thread can be started.

        Examples
        --------
        >>> endpoint = model.telemetry.serve(9100)  # doctest: +SKIP
        >>> endpoint.url  # doctest: +SKIP
        'http://127.0.0.1:9100/metrics'
        """
        serve = None if self._live is None else self._live()
        if serve is None:
            raise ClosedError("no model runs that this telemetry was taken of: call serve on the telemetry of a model")
        return serve(port, address)

    def plot(self, last_s: float | None = None) -> Any:
        """Draw stage times, utilisation and tokens per second over time, with the migrations marked.

        Before the first step, memory and compute time per stage. Needs matplotlib: ``pip install lingualinked[plot]``.

        Parameters
        ----------
        last_s : float, optional
            Seconds before the last step came back to draw; ``None``: all that is remembered.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ArgumentError
            If matplotlib is not installed, or `last_s` is not above 0.
        """
        return figure_of(self, last_s)

    def __reduce__(self) -> tuple[Callable[[], Telemetry], tuple[()]]:  # a copy is of no running model
        return functools.partial(Telemetry, stages=self.stages, workers=self.workers, history=self.history), ()

"""A snapshot of a model's stages and workers, with the recent history.

Knows its exports; not how it was measured.
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

    LiveServe = Callable[
        [], Callable[[int, str], MetricsEndpoint] | None
    ]  # a weak reference, which does not keep the model alive


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry(Shown):
    """The state and recent history of a model's pipeline at one moment; immutable.

    Get it from `ShardedModel.telemetry`.

    Parameters
    ----------
    stages : tuple of StageSnapshot
        In pipeline order.
    workers : tuple of WorkerSnapshot
        The workers that host the stages, each once.
    history : History
        Recent steps, device samples, decisions and migrations, and totals since the pipeline was started.
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
        """Recent samples of devices: memory, CPU, temperature, battery; oldest first."""
        return self.history.devices

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Recent decisions to move layers or to stay, with their numbers; oldest first."""
        return self.history.decisions

    @property
    def migrations(self) -> tuple[Migration, ...]:
        """Recent migrations, successful and failed; oldest first."""
        return self.history.migrations

    @property
    def counters(self) -> Counters:
        """Totals since the pipeline was started."""
        return self.history.counters

    def tokens_per_s(self, window_s: float = 10.0) -> float:
        """Return the new tokens per second of all rows and sessions, over the seconds before the last completed step."""
        return self.history.tokens_per_s(window_s)

    def utilisation(self, window_s: float = 10.0) -> dict[str, float]:
        """Return the fraction of time that each device was busy, over the seconds before the last completed step."""
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
            JSON file to write; an existing file is replaced.

        Returns
        -------
        Path
            The file.
        """
        return write_trace(self.history, path)

    def prometheus(self) -> str:
        """Return totals and the present state as Prometheus' text (needs ``pip install lingualinked[metrics]``).

        Raises
        ------
        ArgumentError
            If prometheus_client is not installed.
        """
        return metrics_text(Reading(stages=self.stages, workers=self.workers, history=self.history))

    def serve(self, port: int, address: str = "127.0.0.1") -> MetricsEndpoint:
        """Serve the running model's metrics to Prometheus over HTTP (needs ``pip install lingualinked[metrics]``).

        Each scrape queries the workers, for at most 5 s; ``lingualinked_up`` says whether all have answered. The endpoint ends
        with the model or its cluster; you need not keep a reference. A model can be served at several ports.

        Parameters
        ----------
        port : int
            Port to listen on; 0: a free one, see ``url`` of the endpoint.
        address : str
            Address of this machine to listen on. Anyone who can reach it can read the metrics: device names and numbers,
            never text or tokens.

        Returns
        -------
        MetricsEndpoint
            With its ``url`` and ``close()``; also a context manager.

        Raises
        ------
        ArgumentError
            If it can't listen there, or prometheus_client is not installed.
        ClosedError
            If the model is closed, or this telemetry does not belong to a running model of this process.
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
            raise ClosedError(
                "the model of this telemetry is not running here: call serve on the telemetry of a running model"
            )
        return serve(port, address)

    def plot(self, last_s: float | None = None) -> Any:
        """Draw stage times, utilisation and tokens per second over time, with the migrations marked.

        Before the first step, memory and compute time per stage. Needs matplotlib: ``pip install lingualinked[plot]``.

        Parameters
        ----------
        last_s : float, optional
            Seconds before the last completed step to draw; ``None``: the whole history.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ArgumentError
            If matplotlib is not installed, or `last_s` is not above 0.
        """
        return figure_of(self, last_s)

    def __reduce__(self) -> tuple[Callable[[], Telemetry], tuple[()]]:  # a copy does not belong to a running model
        return functools.partial(Telemetry, stages=self.stages, workers=self.workers, history=self.history), ()

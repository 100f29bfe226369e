"""What one model's workers say of it: asked now, or as it was known last; served to Prometheus.

It holds neither the pipeline nor the model, so that what it serves keeps none of them alive.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.plans.route import Routes
from lingualinked.cluster.workers.inspection import inspect_workers
from lingualinked.errors import ClosedError, LingualinkedError
from lingualinked.interrupts import uninterrupted
from lingualinked.protocol.messages import WorkerReport
from lingualinked.telemetry.metrics import Reading
from lingualinked.telemetry.recorder import Recorder
from lingualinked.telemetry.snapshot import Telemetry

if TYPE_CHECKING:
    from lingualinked.telemetry.endpoint import MetricsEndpoint

_SCRAPE_S = 5.0  # that workers may take to answer a scrape, which waits for 10 unless it is told otherwise


class Observer:
    """Asks the workers of one model how they are."""

    def __init__(
        self,
        engine: Engine,
        model: int,
        routes: Routes,
        recorder: Recorder,
        cluster_endpoints: weakref.WeakSet[MetricsEndpoint],
    ) -> None:
        self._engine, self._model, self._routes, self._recorder = engine, model, routes, recorder
        self._inspected: tuple[list[WorkerReport], int] = ([], 1)  # with the plan version then in force
        self._endpoints: weakref.WeakSet[MetricsEndpoint] = weakref.WeakSet()
        self._cluster_endpoints = cluster_endpoints  # the cluster closes them with itself
        self._is_stopped = False

    def inspect(self, timeout_s: float) -> None:
        """Ask the workers for reports, and keep them."""
        reports, route = [], None
        while route is not self._routes.current:  # its stages may go while they are looked at
            route = self._routes.current
            reports = inspect_workers(self._engine, list(dict.fromkeys(route.stage_devices)), timeout_s)
        for report in reports:
            self._recorder.add_device(report.device)
        self._inspected = reports, route.version

    def telemetry(self) -> Telemetry:
        """Return what was known last."""
        reports, version = self._inspected
        stages = [
            stage.snapshot
            for report in reports
            for stage in report.stages
            if (stage.model, stage.plan_version) == (self._model, version)
        ]
        return Telemetry(
            stages=tuple(sorted(stages, key=lambda stage: stage.start)),
            workers=tuple(report.worker for report in reports),
            history=self._recorder.history(),
            _live=weakref.WeakMethod(self.serve),
        )

    @uninterrupted
    def serve(self, port: int, address: str) -> MetricsEndpoint:
        """Serve metrics until the endpoint, the model or its cluster is closed."""
        from lingualinked.telemetry.endpoint import MetricsEndpoint  # imports an HTTP server

        self._check_open()
        endpoint = MetricsEndpoint(self._read, port, address)
        self._endpoints.add(endpoint)
        self._cluster_endpoints.add(endpoint)
        try:
            self._check_open()  # whoever has closed the model meanwhile may not have seen it
        except ClosedError:
            endpoint.close()
            raise
        return endpoint

    def stop(self) -> None:
        """Close what is served; nothing can be served any more."""
        self._is_stopped = True
        for endpoint in list(self._endpoints):
            endpoint.close()

    def _check_open(self) -> None:
        self._engine.check_open()
        if self._is_stopped:
            raise ClosedError("the model is closed, and its metrics can't be served any more: load it again")

    def _read(self) -> Reading:
        is_current = True
        try:
            self.inspect(_SCRAPE_S)
        except LingualinkedError:  # the reading says so
            is_current = False
        known = self.telemetry()
        return Reading(stages=known.stages, workers=known.workers, history=known.history, is_current=is_current)

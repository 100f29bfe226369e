"""Asks workers how they are.

Knows the report messages and turns them into plain snapshots and samples.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from lingualinked.cluster.engine import Engine
from lingualinked.cluster.pending import results_of
from lingualinked.protocol.messages import InspectWorker, StageReport, WorkerReport
from lingualinked.telemetry.history import History
from lingualinked.telemetry.reports import StageSnapshot, WorkerSnapshot
from lingualinked.telemetry.samples import DeviceSample
from lingualinked.telemetry.snapshot import Telemetry

if TYPE_CHECKING:
    from lingualinked.telemetry.snapshot import LiveServe


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What one worker says of itself."""

    worker: WorkerSnapshot
    device: DeviceSample
    stages: tuple[StageReport, ...]


def inspect_workers(engine: Engine, names: Sequence[str], timeout_s: float) -> list[Inspection]:
    """Ask workers for a report, all at once; return what they say in the order of the names."""
    time_s = time.monotonic()
    futures = [request_report(engine, name, timeout_s) for name in names]
    reports = cast("list[WorkerReport]", results_of(futures))
    return [inspection_of(name, report, time_s) for name, report in zip(names, reports, strict=True)]


def request_report(engine: Engine, name: str, timeout_s: float) -> concurrent.futures.Future[object]:
    """Ask one worker; return the future of its `WorkerReport`."""
    return engine.request(name, InspectWorker(request=engine.next_request()), "a report", timeout_s)


def inspection_of(name: str, report: WorkerReport, time_s: float) -> Inspection:
    """Sort what the worker of a device has answered to a request of that time."""
    return Inspection(
        worker=WorkerSnapshot(
            device=name,
            pid=report.pid,
            threads=report.threads,
            resident_bytes=report.resident_bytes,
            idle_resident_bytes=report.idle_resident_bytes,
            num_refused=report.num_refused,
        ),
        device=DeviceSample(
            time_s=time_s,
            device=name,
            held_bytes=report.held_bytes,
            available_bytes=report.available_bytes,
            cpu_percent=report.cpu_percent,
            temperature_c=report.temperature_c,
            battery_percent=report.battery_percent,
            on_battery=report.on_battery,
        ),
        stages=report.stages,
    )


def telemetry_of(
    inspections: Sequence[Inspection], model: int, plan_version: int, history: History, serve: LiveServe
) -> Telemetry:
    """Put together what workers say of one model under one version of its plan, what is remembered of it, and who serves it."""
    reports = [
        (each.worker.device, stage)
        for each in inspections
        for stage in each.stages
        if (stage.model, stage.plan_version) == (model, plan_version)
    ]
    reports.sort(key=lambda pair: pair[1].stage)
    return Telemetry(
        stages=tuple(
            StageSnapshot(
                device=device,
                start=stage.start,
                end=stage.end,
                weight_bytes=stage.weight_bytes,
                kv_bytes=stage.kv_bytes,
                num_sessions=stage.num_sessions,
                num_steps=stage.num_steps,
                compute_s=stage.compute_us / 1e6,
                sent_bytes=stage.sent_bytes,
            )
            for device, stage in reports
        ),
        workers=tuple(each.worker for each in inspections),
        history=history,
        _live=serve,
    )

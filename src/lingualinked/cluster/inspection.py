"""Asks workers how they are.

Knows the report messages and turns them into plain snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lingualinked.cluster.engine import Engine
from lingualinked.protocol.messages import Inspect, StageReport, WorkerReport
from lingualinked.telemetry.snapshot import StageSnapshot, Telemetry, WorkerSnapshot


def inspect_workers(
    engine: Engine, names: Sequence[str], timeout_s: float
) -> list[tuple[WorkerSnapshot, tuple[StageReport, ...]]]:
    """Ask workers for a report, all at once.

    Parameters
    ----------
    engine : Engine
        The cluster's I/O thread.
    names : sequence of str
        Devices to ask.
    timeout_s : float
        Seconds that an answer may take.

    Returns
    -------
    list of (WorkerSnapshot, tuple of StageReport)
        In the order of ``names``.
    """
    futures = [engine.request(name, lambda number: Inspect(request=number), "a report", timeout_s) for name in names]
    answers = []
    for name in names:
        # Not held here: a future would lead from its error to this frame and back, and only the collector would free it.
        report = cast("WorkerReport", futures.pop(0).result())
        snapshot = WorkerSnapshot(
            device=name,
            pid=report.pid,
            threads=report.threads,
            resident_bytes=report.resident_bytes,
            idle_resident_bytes=report.idle_resident_bytes,
            num_refused=report.num_refused,
        )
        answers.append((snapshot, report.stages))
    return answers


def inspect_model(engine: Engine, model: int, plan_version: int, names: Sequence[str], timeout_s: float) -> Telemetry:
    """Ask the workers of one model what they have done for it, under one version of its plan."""
    answers = inspect_workers(engine, names, timeout_s)
    reports = [
        (worker.device, stage)
        for worker, stages in answers
        for stage in stages
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
        workers=tuple(worker for worker, _ in answers),
    )

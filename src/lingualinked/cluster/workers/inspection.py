"""Asks workers how they are.

Knows the report messages; not what is made of them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Sequence
from typing import cast

import msgspec

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.protocol.messages import InspectWorker, WorkerReport


def inspect_workers(engine: Engine, names: Sequence[str], timeout_s: float) -> list[WorkerReport]:
    """Ask workers for a report, all at once; return what they say in the order of the names."""
    time_s = time.monotonic()
    futures = [request_report(engine, name, timeout_s) for name in names]
    reports = cast("list[WorkerReport]", results_of(futures))
    return [attribute_report(report, name, time_s) for name, report in zip(names, reports, strict=True)]


def request_report(engine: Engine, name: str, timeout_s: float) -> concurrent.futures.Future[object]:
    """Ask one worker; return the future of its `WorkerReport`."""
    return engine.request(name, InspectWorker(request=engine.next_request()), "a report", timeout_s)


def attribute_report(report: WorkerReport, name: str, time_s: float) -> WorkerReport:
    """Return what the worker of a device has answered to a request of that time, under this name whatever it says."""
    stages = [
        msgspec.structs.replace(each, snapshot=dataclasses.replace(each.snapshot, device=name))
        for each in report.stages
    ]
    return msgspec.structs.replace(
        report,
        worker=dataclasses.replace(report.worker, device=name),
        device=dataclasses.replace(report.device, device=name, time_s=time_s),
        stages=tuple(stages),
    )

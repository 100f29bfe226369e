"""What the workers on other hosts say of these: what they compute with, and how much memory they have.

Knows clusters and reports; not what is planned with them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lingualinked.cluster.inspection import inspect_workers
from lingualinked.errors import WorkerDiedError

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.environment import Environment


def remote_environments(cluster: Cluster) -> dict[str, Environment]:
    """Wait for the workers on other hosts; return what those that live compute with."""
    engine = cluster._engine  # noqa: SLF001 - within the room
    for name in _remote_names(cluster):
        with contextlib.suppress(WorkerDiedError):
            engine.wait_for_worker(name, cluster.timeout_s)
    known = engine.environments()
    return {name: known[name] for name in _remote_names(cluster) if name in known}


def remote_available_bytes(cluster: Cluster) -> dict[str, int]:
    """Ask the workers on other hosts how much memory their stages could use."""
    reports = inspect_workers(cluster._engine, _remote_names(cluster), cluster.timeout_s)  # noqa: SLF001 - within the room
    return {report.device.device: report.device.available_bytes for report in reports}


def _remote_names(cluster: Cluster) -> list[str]:
    return [device.name for device in cluster.devices if device.address is not None]

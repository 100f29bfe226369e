"""What is known of the hosts of workers: what those compute with, and the memory and disk that they have.

Knows clusters and reports; not what is planned with them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lingualinked.cluster.workers.inspection import inspect_workers
from lingualinked.disk_cache import free_cache_bytes
from lingualinked.errors import WorkerDiedError

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.device import Device
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


def free_disk_bytes(cluster: Cluster, device: Device) -> int | None:
    """Return the free disk space where the worker of a device keeps weights; ``None`` if it can't be found out."""
    lease = cluster._workers.leases.get(device.name)  # noqa: SLF001 - within the room
    if lease is not None:
        return lease.facts.free_disk_bytes
    return free_cache_bytes()


def _remote_names(cluster: Cluster) -> list[str]:
    return [device.name for device in cluster.devices if device.address is not None]

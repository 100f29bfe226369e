"""Profiles and plans of models on clusters, kept on disk so that only the first start measures and solves.

Knows footprints, clusters and files; neither checkpoints nor how profiles are measured and plans solved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
import psutil

from lingualinked.cluster.measuring.profiling import library_versions, num_measurements, profile_devices
from lingualinked.disk_cache import read_cached, write_cached
from lingualinked.errors import ArgumentError
from lingualinked.planning.plan import DEFAULT_RESERVE, Plan
from lingualinked.processor import processor_name
from lingualinked.profile import Profile
from lingualinked.sharded.loading.progress import DeviceProgress
from lingualinked.workload import Objective, Workload

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.device import Device, Links
    from lingualinked.environment import Environments
    from lingualinked.model.cutting.footprint import Footprint

_SOLVER = 3  # raise it when the solver decides differently, so that plans on disk are solved again


def find_profile(
    cluster: Cluster,
    footprint: Footprint,
    workload: Workload,
    *,
    refresh: bool = False,
    without: Collection[str] = (),
    is_idle: bool = True,
    progress: bool = False,
) -> Profile:
    """Load the profile from disk, or measure it; keep it unless it is doubtful or was measured under load."""
    devices, links = cluster.devices, cluster.links
    from lingualinked.cluster.workers.remote_hosts import remote_environments  # imports torch

    environments = remote_environments(cluster)
    found = None if refresh else saved_profile(devices, links, footprint, workload, environments)
    if found is not None:
        return found.without(*without)
    measured = [device for device in devices if device.name not in without]
    totals = {device.name: num_measurements(device, footprint.profile, workload) for device in measured}
    with DeviceProgress.of_measuring(totals, shown=progress) as bars:
        profile = profile_devices(cluster, measured, footprint, workload, bars.update)
    is_of_these = cluster.devices == devices and not without and not cluster.is_throttled
    if is_idle and is_of_these and not profile.doubt:
        write_cached(_name("profile", devices, links, footprint, workload, environments), profile.to_json())
    return profile


def saved_profile(
    devices: Sequence[Device],
    links: Links,
    footprint: Footprint,
    workload: Workload,
    environments: Environments,
) -> Profile | None:
    """Load the profile of a model on these devices from disk; ``None`` if there is no readable one.

    ``environments`` are those of the devices on other hosts.
    """
    kept = read_cached(_name("profile", devices, links, footprint, workload, environments))
    with contextlib.suppress(ArgumentError):
        return None if kept is None else _on_devices(Profile.from_json(kept), devices)
    return None


def _on_devices(profile: Profile, devices: Sequence[Device]) -> Profile:
    """Return a profile from disk with the devices as they are reached now."""
    now = {device.name: device for device in devices}
    return dataclasses.replace(
        profile, devices=tuple(dataclasses.replace(each, device=now[each.device.name]) for each in profile.devices)
    )


def find_plan(
    cluster: Cluster,
    footprint: Footprint,
    given: Workload | None,
    objective: Objective,
    *,
    progress: bool,
) -> Plan:
    """Load the plan from disk, or measure, solve and keep it: importing a solver takes as long as loading a small model."""
    from lingualinked.cluster.workers.remote_hosts import remote_available_bytes, remote_environments  # imports torch

    devices = cluster.devices
    environments = remote_environments(cluster)
    workload = footprint.profile.fit_workload(given)
    num_sessions: Literal["any"] | None = "any" if given is None else None
    how = objective, num_sessions, DEFAULT_RESERVE, _SOLVER
    name = _name("plan", devices, cluster.links, footprint, workload, environments, *how)
    kept = read_cached(name)
    if kept is not None:
        with contextlib.suppress(ArgumentError):
            plan = Plan.from_json(kept)
            return dataclasses.replace(plan, profile=_on_devices(plan.measured, devices))
    check_devices(footprint, devices, cluster.links, workload, remote_available_bytes(cluster))
    profile = find_profile(cluster, footprint, workload, progress=progress)
    from lingualinked.planning.planner import solve  # imports scipy

    plan = solve(profile, objective=objective, workload=workload, num_sessions=num_sessions)
    is_of_these = cluster.devices == devices and not cluster.is_throttled  # else they have changed meanwhile
    if is_of_these and not profile.doubt:
        write_cached(name, plan.to_json())
    return plan


def check_devices(
    footprint: Footprint, devices: Sequence[Device], links: Links, workload: Workload, available: Mapping[str, int]
) -> None:
    """Check that some plan fits the devices, before anything is measured; raises like `solve`.

    ``available`` are the bytes of memory that devices on other hosts have.
    """
    from lingualinked.planning.fitting import check_fits  # imports scipy

    on_cpu = [device.name for device in devices if device.accelerator == "cpu" and device.address is None]
    free = dict.fromkeys(on_cpu, psutil.virtual_memory().available // max(1, len(on_cpu)))
    check_fits(footprint.profile, devices, links, workload, free_bytes={**free, **available}, reserve=DEFAULT_RESERVE)


def _name(
    kind: str,
    devices: Sequence[Device],
    links: Links,
    footprint: Footprint,
    workload: Workload,
    environments: Environments,
    *others: object,
) -> str:
    """Name a file by a digest of everything that its content depends on.

    Another host is known by what it computes with: its addresses and keys may change.
    """
    known = [(*ends, links[ends]) for ends in sorted(links)]
    machine = library_versions(), platform.node(), processor_name(), os.environ.get("ATEN_CPU_CAPABILITY", "")
    hosts = {name: msgspec.structs.replace(each, host_id="", machine="") for name, each in environments.items()}
    placed = [
        device
        if device.address is None
        else (
            dataclasses.replace(device, address=None, server_key=None, key=None, advertise=None),
            hosts.get(device.name),
        )
        for device in devices
    ]
    key = [footprint.profile, placed, known, workload, *machine, *others]
    digest = hashlib.blake2b(msgspec.json.encode(key, order="sorted"), digest_size=16).hexdigest()
    return f"{kind}-{digest}.json"

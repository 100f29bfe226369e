"""Profiles and plans of models on clusters, kept on disk so that only the first start measures and solves.

Knows checkpoints, clusters and files; what is measured, and how it is solved, is others' business.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from lingualinked.errors import ArgumentError
from lingualinked.interrupts import interruptible
from lingualinked.planning.plan import DEFAULT_RESERVE, Plan
from lingualinked.profile import Profile
from lingualinked.sharded.kept_files import keep, read_kept
from lingualinked.workload import Objective, Workload

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.device import Device, Links
    from lingualinked.model.footprint import Footprint
    from lingualinked.model.spec import ModelSpec
    from lingualinked.planning.estimate import Figures
    from lingualinked.sharded.model import ShardedModel

_SOLVER = 2  # to be raised when it decides otherwise: plans of before are then solved again


@interruptible
def profile_model(
    model_or_path: ShardedModel | str | os.PathLike[str],
    cluster: Cluster,
    *,
    workload: Workload | None = None,
    refresh: bool = False,
    progress: bool = False,
    **kwargs: Any,
) -> Profile:
    """Measure what a model's layers cost on every device of a cluster, and what its links carry.

    Each device runs the model's real modules in the workload's shapes, one or two layers at a time with weights that are
    filled in; no weights are read. The profile is kept on disk (``$XDG_CACHE_HOME/lingualinked``), so that a second call
    for the same model, dtype, devices, links, workload, machine and versions of the libraries measures nothing. One whose
    times spread widely, or that was measured while other processes kept the machine busy, says so in ``profile.doubt`` and
    is not kept.

    Parameters
    ----------
    model_or_path : ShardedModel, str or PathLike
        A sharded model, or what `ShardedModel.from_pretrained` takes.
    cluster : Cluster
        Where to measure.
    workload : Workload or None
        Tells the shapes; ``None``: the default one.
    refresh : bool
        Whether to measure again what is on disk already.
    progress : bool
        Whether to show a progress bar per device while it measures.
    **kwargs
        As in `ShardedModel.from_pretrained`: ``dtype``, ``config``, ``load_format``, ...

    Returns
    -------
    Profile

    Raises
    ------
    LingualinkedError
        As `ShardedModel.from_pretrained` says of the path and its arguments, and of workers that fail.
    """
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.sharded.loading import LoadArguments, describe, describe_spec
    from lingualinked.sharded.model import ShardedModel

    if not isinstance(cluster, Cluster):
        raise ArgumentError(f"cluster is a {type(cluster).__name__}: give a lingualinked.Cluster")
    if isinstance(model_or_path, ShardedModel):
        described = describe_spec(model_or_path._pipeline.spec)  # noqa: SLF001 - within the room
    else:
        described = describe(LoadArguments.of(os.fspath(model_or_path), cluster, **kwargs))
    footprint = described.footprint()
    fitting = footprint.profile.fit_workload(workload)
    return find_profile(cluster, described.spec, footprint, fitting, refresh=refresh, progress=progress)


def estimate_profile(
    path: str | os.PathLike[str],
    devices: Sequence[Device],
    figures: Mapping[str, Figures],
    *,
    links: Links | None = None,
    workload: Workload | None = None,
    **kwargs: Any,
) -> Profile:
    """Estimate a profile from what devices are said to do, to plan for a cluster that is not there yet.

    Parameters
    ----------
    path : str or PathLike
        As in `ShardedModel.from_pretrained`; with ``load_format="dummy"`` a ``config.json`` suffices.
    devices : sequence of Device
        With memory, bandwidth and latency as they are said to be.
    figures : mapping of str to Figures
        Operations and bytes per second of each device, by name.
    links : mapping of (str, str) to Link, optional
        Links that are other than what their two ends give.
    workload : Workload or None
        Tells the shapes; ``None``: the default one.
    **kwargs
        As in `ShardedModel.from_pretrained`: ``dtype``, ``config``, ``load_format``, ...

    Returns
    -------
    Profile

    Raises
    ------
    ArgumentError
        If there is no device, a name occurs twice, figures are missing, or a link leads to no device.
    LingualinkedError
        As `ShardedModel.from_pretrained` says of the path and its arguments.
    """
    from lingualinked.sharded.loading import LoadArguments, describe

    return describe(LoadArguments.of(os.fspath(path), None, **kwargs)).estimate(devices, figures, links, workload)


def find_profile(
    cluster: Cluster,
    spec: ModelSpec,
    footprint: Footprint,
    workload: Workload,
    *,
    refresh: bool = False,
    without: Collection[str] = (),
    is_idle: bool = True,
    progress: bool = False,
) -> Profile:
    """Load the profile from disk, or measure it and keep it if it is not doubtful and the devices are ``is_idle``."""
    devices, links = cluster.devices, cluster.links
    found = None if refresh else saved_profile(devices, links, footprint, workload)
    if found is not None:
        return found.without(*without)
    from lingualinked.cluster.profiling import num_measurements, profile_devices
    from lingualinked.sharded.progress import DeviceProgress

    measured = [device for device in devices if device.name not in without]
    totals = {device.name: num_measurements(device, footprint.profile, workload) for device in measured}
    with DeviceProgress.of_measuring(totals, shown=progress) as bars:
        profile = profile_devices(cluster, measured, spec, footprint, workload, bars.update)
    is_of_these = cluster.devices == devices and not without and not cluster.is_throttled
    if is_idle and is_of_these and not profile.doubt:
        keep(_name("profile", _key(devices, links, footprint, workload)), profile.to_json())
    return profile


def saved_profile(devices: Sequence[Device], links: Links, footprint: Footprint, workload: Workload) -> Profile | None:
    """Load the profile of a model on these devices from disk; ``None`` if there is none that can be read."""
    kept = read_kept(_name("profile", _key(devices, links, footprint, workload)))
    with contextlib.suppress(ArgumentError):
        return None if kept is None else Profile.from_json(kept)
    return None


def find_plan(
    cluster: Cluster,
    spec: ModelSpec,
    footprint: Footprint,
    workload: Workload,
    objective: Objective,
    *,
    progress: bool,
) -> Plan:
    """Load the plan from disk, or profile, solve and keep it: loading a solver takes as long as loading a small model."""
    devices = cluster.devices
    key = [*_key(devices, cluster.links, footprint, workload), objective, DEFAULT_RESERVE, _SOLVER]
    name = _name("plan", key)
    kept = read_kept(name)
    if kept is not None:
        with contextlib.suppress(ArgumentError):
            return Plan.from_json(kept)
    check_devices(footprint, devices, cluster.links, workload)
    profile = find_profile(cluster, spec, footprint, workload, progress=progress)
    from lingualinked.planning.planner import solve

    plan = solve(profile, objective=objective, workload=workload)
    if not profile.doubt and cluster.devices == devices and not cluster.is_throttled:  # else it is of other devices
        keep(name, plan.to_json())
    return plan


def check_devices(footprint: Footprint, devices: Sequence[Device], links: Links, workload: Workload) -> None:
    """Refuse a model that no plan could place on devices of this machine, before anything is measured.

    Raises
    ------
    InfeasiblePlanError
        As `solve`.
    """
    from lingualinked.planning.fitting import check_fits

    on_cpu = [device.name for device in devices if device.accelerator == "cpu"]
    free = dict.fromkeys(on_cpu, psutil.virtual_memory().available // max(1, len(on_cpu)))
    check_fits(footprint.profile, devices, links, workload, free_bytes=free, reserve=DEFAULT_RESERVE)


def _key(devices: Sequence[Device], links: Links, footprint: Footprint, workload: Workload) -> list[object]:
    """Everything that a profile depends on."""
    from lingualinked.cluster.profiling import library_versions

    known = [(*ends, links[ends]) for ends in sorted(links)]
    return [footprint.profile, tuple(devices), known, workload, library_versions(), platform.node(), _processor()]


def _name(kind: str, key: list[object]) -> str:
    digest = hashlib.blake2b(msgspec.json.encode(key, order="sorted"), digest_size=16).hexdigest()
    return f"{kind}-{digest}.json"


def _processor() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        return next((line.strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()

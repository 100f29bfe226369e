"""`profile_model` and `estimate_profile`: the measured and the estimated profile of a model.

Knows checkpoints and clusters; not how layers are measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.workers.devices import describe_cluster
from lingualinked.cluster_file import Devices, read_description
from lingualinked.errors import ArgumentError
from lingualinked.interrupts import interruptible
from lingualinked.profile import Profile
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.model import ShardedModel
from lingualinked.sharded.profiles.saved import check_devices, find_profile, saved_profile
from lingualinked.workload import Workload

if TYPE_CHECKING:
    from lingualinked.device import Device, Links
    from lingualinked.device_specs import DeviceSpecs


@interruptible
def profile_model(
    model_or_path: ShardedModel | str | os.PathLike[str],
    cluster: Cluster | Devices,
    *,
    workload: Workload | None = None,
    refresh: bool = False,
    progress: bool = False,
    **kwargs: Any,
) -> Profile:
    """Measure the cost of a model's layers on every device of a cluster, and the latency and bandwidth of its links.

    Each device runs the model's real modules in the workload's shapes, one or two layers at a time and with made-up weights;
    no weights are read. The profile is kept on disk (``$XDG_CACHE_HOME/lingualinked``), so that a second call
    for the same model, dtype, devices, links, workload, machine and versions of the libraries measures nothing. A profile
    whose times spread widely, or that was measured while other processes kept the machine busy, says so in ``profile.doubt``
    and is not kept.

    Parameters
    ----------
    model_or_path : ShardedModel, str or PathLike
        A sharded model, or what `ShardedModel.from_pretrained` takes.
    cluster : Cluster, int, str, PathLike or sequence of Device
        The cluster to measure on, or what `Cluster` takes as devices: then one is started for the measurement.
    workload : Workload or None
        Gives the shapes; ``None``: the default workload.
    refresh : bool
        Whether to measure again although a profile is on disk.
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
        As in `ShardedModel.from_pretrained`, for the path, its arguments, and workers that fail.
    """
    from lingualinked.sharded.loading.describing import describe, describe_spec  # imports torch

    if isinstance(model_or_path, ShardedModel):
        if kwargs:
            raise ArgumentError(f"a loaded model is measured as it is: leave out {', '.join(sorted(kwargs))}")
        described = describe_spec(model_or_path._pipeline.spec)  # noqa: SLF001 - within the room
    else:
        described = describe(_arguments(model_or_path, kwargs))
    footprint = described.footprint()
    fitting = footprint.profile.fit_workload(workload)
    if isinstance(cluster, Cluster):
        return find_profile(cluster, footprint, fitting, refresh=refresh, progress=progress)
    asked = describe_cluster(cluster)
    if all(
        device.address is None for device in asked.devices
    ):  # of other hosts, nothing is known before their workers answer
        found = None if refresh else saved_profile(asked.devices, asked.links, footprint, fitting, {})
        if found is not None:
            return found
        check_devices(footprint, asked.devices, asked.links, fitting, {})
    with Cluster(asked) as own:
        return find_profile(own, footprint, fitting, refresh=refresh, progress=progress)


def estimate_profile(
    path: str | os.PathLike[str],
    devices: Sequence[Device] | str | os.PathLike[str],
    specs: Mapping[str, DeviceSpecs] | None = None,
    *,
    links: Links | None = None,
    workload: Workload | None = None,
    **kwargs: Any,
) -> Profile:
    """Estimate a profile from the stated rates of devices, to plan for a cluster that is not there yet.

    Parameters
    ----------
    path : str or PathLike
        As in `ShardedModel.from_pretrained`; with ``load_format="dummy"`` a ``config.json`` suffices.
    devices : sequence of Device, str or PathLike
        With their stated memory, bandwidth and latency; or the path of a cluster file, which has links and specs too.
    specs : mapping of str to DeviceSpecs, optional
        Operations and bytes per second of each device, by name, unless the cluster file states them.
    links : mapping of (str, str) to Link, optional
        Links that differ from what their two ends imply.
    workload : Workload or None
        Gives the shapes; ``None``: the default workload.
    **kwargs
        As in `ShardedModel.from_pretrained`: ``dtype``, ``config``, ``load_format``, ...

    Returns
    -------
    Profile

    Raises
    ------
    ArgumentError
        If there is no device, a name occurs twice, specs are missing, or a link names an unknown device.
    LingualinkedError
        As in `ShardedModel.from_pretrained`, for the path and its arguments.
    """
    from lingualinked.sharded.loading.describing import describe  # imports torch

    if isinstance(devices, str | os.PathLike):
        cluster = read_description(devices)
        devices, specs, links = cluster.devices, {**cluster.specs, **(specs or {})}, {**cluster.links, **(links or {})}
    return describe(_arguments(path, kwargs)).estimate(devices, specs or {}, links, workload)


def _arguments(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> LoadArguments:
    """Check arguments that say what the model is; those that say where and how it runs have no effect on a profile."""
    useless = sorted(set(kwargs) & {"cluster", "max_kv_tokens", "objective", "plan", "rebalance", "seed", "timeout_s"})
    if useless:
        raise ArgumentError(f"a profile does not depend on {', '.join(useless)}: pass them to solve or from_pretrained")
    return LoadArguments.of(path, **kwargs)

"""Gets the profile that a pipeline needs before it can rebalance.

Knows models and clusters. Does not decide anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingualinked.cluster.measuring.profiling import extend_profile
from lingualinked.sharded.profiles.saved import find_profile

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.control.policy import RebalancePolicy
    from lingualinked.profile import Profile
    from lingualinked.sharded.loading.describing import Described
    from lingualinked.workload import Workload


def enable_rebalancing(
    pipeline: Pipeline, described: Described, workload: Workload | None, policy: RebalancePolicy, *, is_automatic: bool
) -> None:
    """Enable a pipeline to rebalance, by the profile of its plan or by one that is measured now."""
    plan = pipeline.plan
    profile, given = plan.profile, workload or plan.workload
    if profile is None:
        if all(device.name in pipeline.ended_devices for device in pipeline.cluster.devices):
            pipeline.cluster.wait()  # raises WorkerDiedError: nothing is left to be measured
        footprint = described.footprint()
        fitting = footprint.profile.fit_workload(given)
        profile = find_profile(
            pipeline.cluster,
            footprint,
            fitting,
            without=pipeline.ended_devices,
            is_idle=is_automatic,  # it is measured before the first session; otherwise while sessions may run
        )
    pipeline.enable_rebalancing(profile, profile.model.fit_workload(given), policy, is_automatic=is_automatic)


def extended_profile(pipeline: Pipeline, described: Described, device: str) -> Profile:
    """Return the profile that a pipeline decides from, extended by a device, which is measured if necessary."""
    profile = pipeline.profile
    assert profile is not None, "a pipeline that decides has a profile"
    if device in profile.names:
        return profile
    footprint = described.footprint()
    workload = footprint.profile.fit_workload(pipeline.plan.workload)
    living = profile.without(*(name for name in profile.names if name in pipeline.ended_devices))
    return extend_profile(pipeline.cluster, footprint, living, device, workload)

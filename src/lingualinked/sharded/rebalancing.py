"""What a pipeline needs before it can decide where its layers are best: a profile of the model on its devices.

Knows models and clusters; what is decided from it, is others' business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingualinked.sharded.profiling import find_profile

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.control.policy import RebalancePolicy
    from lingualinked.sharded.loading import Described
    from lingualinked.workload import Workload


def decide_from_profile(
    pipeline: Pipeline, described: Described, workload: Workload | None, policy: RebalancePolicy, *, is_automatic: bool
) -> None:
    """Have a pipeline decide where its layers are best, from the profile of its plan or one that is measured now."""
    plan = pipeline.plan
    profile, given = plan.profile, workload or plan.workload
    if profile is None:
        footprint = described.footprint()
        fitting = footprint.profile.fit_workload(given)
        profile = find_profile(pipeline.cluster, described.spec, footprint, fitting)
    pipeline.decide_from(profile, profile.model.fit_workload(given), policy, is_automatic=is_automatic)

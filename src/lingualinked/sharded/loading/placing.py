"""Finds the plan to load a model by: the given one, the even one, or the solver's.

Knows plans, bytes of weights and devices; imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lingualinked.cluster.cluster import Cluster
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.even import even_plan
from lingualinked.planning.plan import Plan, check_plan, complete_plan
from lingualinked.planning.plan_checks import check_trust
from lingualinked.profile import ModelProfile
from lingualinked.sharded.profiles.saved import find_plan
from lingualinked.weight_bytes import WeightBytes
from lingualinked.workload import Workload

if TYPE_CHECKING:
    from lingualinked.sharded.loading.arguments import LoadArguments
    from lingualinked.sharded.loading.describing import Described


def find_or_fit_plan(described: Described, arguments: LoadArguments) -> Plan:
    """Return the given plan, fitted to this model and cluster; or the even one; or find the solver's plan."""
    cluster, given, weights = arguments.cluster, arguments.plan, described.parts.weights
    assert cluster is not None
    assert not isinstance(given, tuple)  # each stack has its own
    if given is None:
        footprint, objective = described.footprint(), arguments.objective
        return find_plan(cluster, footprint, arguments.workload, objective, progress=arguments.progress)
    if isinstance(given, str):
        return fit_plan(even_plan(weights, cluster.devices), weights, cluster, None, arguments.workload)
    profile = None if given.profile is None else described.footprint().profile
    return fit_plan(given, weights, cluster, profile, arguments.workload)


def fit_plan(
    plan: Plan, weights: WeightBytes, cluster: Cluster, model: ModelProfile | None, workload: Workload | None
) -> Plan:
    """Check a plan against a model and a cluster, and fill in bytes, exactness and workload.

    The plan's own workload comes before the given one; layers that either keeps on trusted devices stay there.
    """
    check_plan(plan, len(weights.layers), [device.name for device in cluster.devices])
    if plan.profile is not None and model is not None and plan.profile.model.fingerprint != model.fingerprint:
        raise InfeasiblePlanError(
            f"the plan was made from a profile of another model ({plan.profile.model.name}, "
            f"{plan.profile.model.dtype}): profile and solve for this one"
        )
    if workload is not None:
        front, back = (max(pair) for pair in zip(plan.trusted_layers, workload.trusted_layers, strict=True))
        workload = dataclasses.replace(plan.workload or workload, trusted_layers=(front, back))
    plan = dataclasses.replace(complete_plan(plan, weights, cluster.devices), workload=workload or plan.workload)
    check_trust(plan, cluster.devices)
    return plan

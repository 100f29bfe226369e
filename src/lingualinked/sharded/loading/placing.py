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
from lingualinked.workload import Workload

if TYPE_CHECKING:
    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.sharded.loading.arguments import LoadArguments
    from lingualinked.sharded.loading.describing import Described


def find_or_fit_plan(described: Described, arguments: LoadArguments) -> Plan:
    """Return the given plan, fitted to this model and cluster; or the even one; or find the solver's plan."""
    cluster, given, parts = arguments.cluster, arguments.plan, described.parts
    assert cluster is not None
    assert not isinstance(given, tuple)  # each stack has its own
    if given is None:
        footprint, objective = described.footprint(), arguments.objective
        return find_plan(cluster, footprint, arguments.workload, objective, progress=arguments.progress)
    if isinstance(given, str):
        even = even_plan(parts.weights, cluster.devices, parts.transmission.forbidden_cuts)
        return fit_plan(even, parts, cluster, None, arguments.workload)
    profile = None if given.profile is None else described.footprint().profile
    held = given.held_instead(parts.transmission)
    return fit_plan(given, parts.holding(held), cluster, profile, arguments.workload)


def fit_plan(
    plan: Plan, parts: ModelParts, cluster: Cluster, model: ModelProfile | None, workload: Workload | None
) -> Plan:
    """Check a plan against a model and a cluster, and fill in bytes, exactness and workload.

    The plan's own workload comes before the given one; layers that either keeps on trusted devices stay there.
    """
    names = [device.name for device in cluster.devices]
    check_plan(plan, parts.num_layers, names, parts.transmission)
    if plan.profile is not None and model is not None and plan.profile.model.fingerprint != model.fingerprint:
        raise InfeasiblePlanError(
            f"the plan was made from a profile of another model ({plan.profile.model.name}, "
            f"{plan.profile.model.dtype}): profile and solve for this one"
        )
    if workload is not None:
        front, back = (max(pair) for pair in zip(plan.trusted_layers, workload.trusted_layers, strict=True))
        workload = dataclasses.replace(plan.workload or workload, trusted_layers=(front, back))
    plan = dataclasses.replace(complete_plan(plan, parts.weights, cluster.devices), workload=workload or plan.workload)
    check_trust(plan, cluster.devices, parts.transmission)
    return plan

"""Why nothing can be placed: a permission, a link, memory, or a limit on the bottleneck.

Knows a problem that has no placement; how the placements were searched is told by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.placement.problem import Placement, Problem, device_bytes
from lingualinked.quantities import bytes_text, count_text


def explain_infeasible(
    problem: Problem,
    devices: Sequence[int],
    max_bottleneck_s: float,
    closest: Callable[[], tuple[Placement, float]],
) -> InfeasiblePlanError:
    """Find what prevents every placement.

    Parameters
    ----------
    problem : Problem
        A problem without a placement.
    devices : sequence of int
        Those that may be used.
    max_bottleneck_s : float
        The limit on the bottleneck; ``inf`` if there is none.
    closest : callable
        Finds the placement that is closest to fitting, and the most bytes that a device lacks in it.

    Returns
    -------
    InfeasiblePlanError
        To be raised.
    """
    for allowed, what, verb in (
        (problem.may_be_first, "first", "see token ids"),
        (problem.may_be_last, "last", "see logits"),
    ):
        if not any(allowed[device] for device in devices):
            return InfeasiblePlanError(
                f"no device may hold the {what} stage: none of {_names(problem, devices)} may {verb}; mark one as trusted"
            )
    placement, excess = closest()
    if not placement:
        return InfeasiblePlanError(
            f"the permissions of {_names(problem, devices)} join no first stage to a last stage over "
            f"{count_text(problem.num_layers, 'layer')}; permit another device to hold an end"
        )
    if excess > 0:
        return _memory(problem, devices, placement)
    weights_fit = f"the weights fit on {_names(problem, devices)}, but"
    if math.isinf(max_bottleneck_s):
        return InfeasiblePlanError(f"{weights_fit} no links join devices that hold them all; connect more devices")
    return InfeasiblePlanError(
        f"{weights_fit} no placement keeps each device and link within max_bottleneck_s={max_bottleneck_s:.6g}; raise the limit"
    )


def _memory(problem: Problem, devices: Sequence[int], placement: Placement) -> InfeasiblePlanError:
    missing_of = {
        device: device_bytes(problem, placement, device) - problem.capacity_bytes[device]
        for device in {span.device: None for span in placement}
    }
    tightest = max(missing_of, key=lambda device: missing_of[device])
    missing = math.ceil(missing_of[tightest])
    total = problem.layer_bytes.sum() + problem.first_bytes + problem.last_bytes
    usable = np.maximum(problem.capacity_bytes[list(devices)] - problem.stage_bytes[list(devices)], 0).sum()
    if usable < total - problem.tied_bytes:
        lacking = math.ceil(total - problem.tied_bytes - usable)
        return InfeasiblePlanError(
            f"weights and KV need {bytes_text(total - problem.tied_bytes)}, and there is room for "
            f"{bytes_text(usable)} on {_names(problem, devices)}: {bytes_text(lacking, round_up=True)} short; tightest is "
            f"{problem.names[tightest]!r}, {bytes_text(missing, round_up=True)} short in the placement closest to fitting; "
            "add a device, or raise memory",
            missing_bytes=lacking,
        )
    return InfeasiblePlanError(
        f"no contiguous placement fits: in the closest one device {problem.names[tightest]!r} is "
        f"{bytes_text(missing, round_up=True)} short; raise its memory, plan for fewer tokens, or add a device",
        missing_bytes=missing,
    )


def _names(problem: Problem, devices: Sequence[int]) -> str:
    return ", ".join(repr(problem.names[device]) for device in devices)

"""Whether a plan keeps to the limits of a cluster's devices: their memory, and whom token ids and logits may reach.

Knows plans and devices; not how either was made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lingualinked.device import Device
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.plan import Plan
from lingualinked.planning.planned_stage import PlannedStage
from lingualinked.quantities import bytes_text, count_text
from lingualinked.transmission import Transmission


def check_memory(plan: Plan, devices: Iterable[Device]) -> None:
    """Refuse a plan that puts more weights on a device than its memory limit allows, and say how many bytes are missing."""
    for device in devices:
        num_bytes = sum(stage.weight_bytes for stage in plan.stages if stage.device == device.name)
        if device.memory_bytes is not None:
            refuse_overfull(device.name, num_bytes, device.memory_bytes, "weights")


def refuse_overfull(device: str, num_bytes: int, limit: float, held: str) -> None:
    """Refuse a plan under which a device would hold more bytes than it can; ``held`` says of what."""
    if num_bytes > limit:
        missing = int(num_bytes - limit)
        raise InfeasiblePlanError(
            f"the plan puts {bytes_text(num_bytes)} of {held} on device {device!r}, which has {bytes_text(limit)}: "
            f"{bytes_text(missing, round_up=True)} short; raise its memory or give it fewer layers",
            missing_bytes=missing,
        )


def check_num_stages(num_stages: int, num_layers: int, forbidden_cuts: Collection[int]) -> None:
    """Refuse more stages than forbidden cuts leave places to begin at."""
    most = num_layers - len(forbidden_cuts)
    if num_stages > most:
        raise InfeasiblePlanError(
            f"{count_text(num_stages, 'stage')} for a model whose layers {', '.join(map(str, sorted(forbidden_cuts)))} must each lie with the layer "
            f"before: it can be cut into at most {count_text(most, 'stage')}; use fewer devices"
        )


def check_trust(plan: Plan, devices: Iterable[Device], transmission: Transmission | None = None) -> None:
    """Refuse a plan that puts the ends of the model on devices that are not trusted, once any device of the cluster is.

    So are other layers that need token ids: a transmission map names them.
    Also refuses ``trusted_layers`` of its workload where no device is trusted.
    """
    trusted_layers = plan.trusted_layers
    trusted = {device.name for device in devices if device.trusted}
    if plan.workload is not None:
        plan.workload.check_trusted(any_trusted=bool(trusted))
    if not trusted:
        return
    front, back = max(1, trusted_layers[0]), plan.num_layers - max(1, trusted_layers[1])
    for stage in plan.stages:
        if (stage.start < front or stage.end > back) and stage.device not in trusted:
            asked = f", and trusted_layers={trusted_layers}" if any(trusted_layers) else ""
            raise InfeasiblePlanError(
                f"the plan puts layers [{stage.start}, {stage.end}) on device {stage.device!r}, which is not trusted: the "
                f"first and the last stage see token ids and logits{asked}; put them on trusted devices"
            )
        if (
            transmission is not None
            and stage.device not in trusted
            and _needs_text(stage, plan.num_layers, transmission)
        ):
            raise InfeasiblePlanError(
                f"the plan puts layers [{stage.start}, {stage.end}) on device {stage.device!r}, which is not trusted: that stage needs "
                f"token ids, or what is made of them before the layers; put it on a trusted device"
            )


def _needs_text(stage: PlannedStage, num_layers: int, transmission: Transmission) -> bool:
    return any(
        shortcut.shows_text and shortcut.is_sent_to(stage.start, stage.end, num_layers)
        for shortcut in transmission.shortcuts
    )

"""The even split: every device gets a contiguous span, and the largest is as small as it can be.

Knows bytes only; which device is faster is not asked here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence

from lingualinked.device import Device
from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.plan import Plan, complete_plan
from lingualinked.planning.plan_checks import check_num_stages
from lingualinked.quantities import bytes_text, count_text
from lingualinked.weight_bytes import WeightBytes


def even_plan(weights: WeightBytes, devices: Sequence[Device], forbidden_cuts: Collection[int] = ()) -> Plan:
    """Split a model over all devices, in their order, as evenly by bytes as its layers allow; none begins at a forbidden cut.

    Minimises the largest stage over all contiguous splits in which every device holds at least one layer and no
    device exceeds its memory limit, by dynamic programming over (devices used, layers placed).
    """
    num_layers, num_devices = len(weights.layers), len(devices)
    if num_devices > num_layers:
        raise InfeasiblePlanError(
            f"{count_text(num_devices, 'stage')} for {count_text(num_layers, 'layer')}: a stage holds at least one layer, "
            f"so use at most {count_text(num_layers, 'device')}"
        )
    check_num_stages(num_devices, num_layers, forbidden_cuts)
    limits = _limits(devices)
    before = [0, *itertools.accumulate(weights.layers)]

    def stage_bytes(start: int, end: int) -> int:
        ends = weights.of_ends(has_first=start == 0, has_last=end == num_layers)
        return before[end] - before[start] + ends + weights.everywhere

    def size_within_limit(device: int, size: int) -> float:
        return size if size <= limits[device] else math.inf

    def excess(device: int, size: int) -> float:
        return max(0, size - limits[device])

    def search(cost: Callable[[int, int], float]) -> list[int] | None:
        """Find the boundaries whose costliest stage costs least; ``None`` if that is infinitely much."""
        best = [[math.inf] * (num_layers + 1) for _ in range(num_devices + 1)]
        cut = [[0] * (num_layers + 1) for _ in range(num_devices + 1)]
        best[0][0] = 0
        for used in range(1, num_devices + 1):
            last_end = num_layers - (num_devices - used)
            ends = [num_layers] if used == num_devices else range(used, last_end + 1)
            for end in ends:
                for start in (each for each in range(used - 1, end) if each not in forbidden_cuts):
                    largest = max(best[used - 1][start], cost(used - 1, stage_bytes(start, end)))
                    if largest < best[used][end]:
                        best[used][end], cut[used][end] = largest, start
        if best[num_devices][num_layers] == math.inf:
            return None
        boundaries = [num_layers]
        for used in range(num_devices, 0, -1):
            boundaries.append(cut[used][boundaries[-1]])
        return boundaries[::-1]

    boundaries = search(size_within_limit)
    if boundaries is None:
        raise _does_not_fit(weights, devices, search(excess) or [])
    spans = zip([device.name for device in devices], boundaries[:-1], boundaries[1:], strict=True)
    return complete_plan(Plan.from_spans(spans), weights, devices)


def _limits(devices: Sequence[Device]) -> list[float]:
    return [math.inf if device.memory_bytes is None else device.memory_bytes for device in devices]


def _does_not_fit(weights: WeightBytes, devices: Sequence[Device], closest: Sequence[int]) -> InfeasiblePlanError:
    total = weights.of_span(0, len(weights.layers)) + weights.tied * (len(devices) > 1)
    limits, smallest_layer = _limits(devices), min(weights.layers)
    for device, limit in zip(devices, limits, strict=True):
        if limit < smallest_layer:
            missing = int(smallest_layer - limit)
            return InfeasiblePlanError(
                f"device {device.name!r} has {bytes_text(limit)} of memory and the smallest layer takes "
                f"{bytes_text(smallest_layer)}: {bytes_text(missing, round_up=True)} short; "
                "raise its memory or leave it out",
                missing_bytes=missing,
            )
    available = sum(limits)
    if available < total:
        missing = int(total - available)
        return InfeasiblePlanError(
            f"the weights take {bytes_text(total)} and {count_text(len(devices), 'device')} offer "
            f"{bytes_text(available)}: {bytes_text(missing, round_up=True)} short; add a device, or raise memory",
            missing_bytes=missing,
        )
    held = itertools.starmap(weights.of_span, itertools.pairwise(closest))
    excess, name = max((size - limit, device.name) for size, limit, device in zip(held, limits, devices, strict=True))
    return InfeasiblePlanError(
        f"no contiguous split fits: in the closest one device {name!r} is {bytes_text(int(excess), round_up=True)} "
        "short; raise its memory, reorder the devices, or add one",
        missing_bytes=int(excess),
    )

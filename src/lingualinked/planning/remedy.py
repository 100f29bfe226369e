"""What would make a model fit that no plan can place: a shorter text, a smaller batch, or one more device of some size.

Knows profiles, workloads and whether a placement exists; finds none.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable

from lingualinked.errors import InfeasiblePlanError
from lingualinked.planning.placement.solver import fits
from lingualinked.planning.workload_costs import WorkloadCosts
from lingualinked.profile import Profile
from lingualinked.quantities import bytes_text, count_text
from lingualinked.units import MOST_BYTES
from lingualinked.workload import Workload


def model_fits(profile: Profile, workload: Workload, reserve: float) -> bool:
    """Return whether any plan places the model within memory, however slow it is."""
    return fits(WorkloadCosts(profile, workload, reserve).problem())


def add_remedy(error: InfeasiblePlanError, profile: Profile, workload: Workload, reserve: float) -> InfeasiblePlanError:
    """Add to a refusal what would fit, where memory or permissions are the cause."""
    if model_fits(profile, workload, reserve):
        return error

    def is_too_much(changed: Workload) -> bool:
        return not model_fits(profile, changed, reserve)

    def largest(most: int, change: Callable[[int], Workload]) -> int:
        """Find the largest number from 1 to ``most`` that fits, given that all smaller ones do too; 0 if none does."""
        return bisect.bisect(range(1, most + 1), False, key=lambda number: is_too_much(change(number)))

    remedies = []
    tokens = largest(workload.num_tokens - 1, functools.partial(_of_tokens, workload))
    if tokens >= 2:
        remedies.append(f"texts of {count_text(tokens, 'token')} instead of {workload.num_tokens}")
    rows = largest(workload.batch_size - 1, lambda number: dataclasses.replace(workload, batch_size=number))
    if rows:
        remedies.append(f"batch_size={rows} instead of {workload.batch_size}")
    sessions = largest(workload.num_sessions - 1, lambda number: dataclasses.replace(workload, num_sessions=number))
    if sessions:
        remedies.append(f"num_sessions={sessions} instead of {workload.num_sessions}")
    if max(workload.trusted_layers) > 1:
        fewer = largest(max(workload.trusted_layers) - 1, functools.partial(_of_trusted, workload))
        changed = _of_trusted(workload, fewer)
        if not is_too_much(changed):
            remedies.append(f"trusted_layers={changed.trusted_layers} instead of {workload.trusted_layers}")
    added = _extra_memory(profile, workload, reserve)
    if added is not None:
        remedies.append(f"one more device of at least {bytes_text(added, round_up=True)}")
    text = f"{error}; what would fit: {', or '.join(remedies)}" if remedies else str(error)
    return InfeasiblePlanError(text, missing_bytes=error.missing_bytes)


def _of_tokens(workload: Workload, num_tokens: int) -> Workload:
    prompt = max(1, min(workload.prompt_tokens, num_tokens - 1))
    return dataclasses.replace(workload, prompt_tokens=prompt, new_tokens=max(1, num_tokens - prompt))


def _of_trusted(workload: Workload, most: int) -> Workload:
    front, back = workload.trusted_layers
    return dataclasses.replace(workload, trusted_layers=(min(front, most), min(back, most)))


def _extra_memory(profile: Profile, workload: Workload, reserve: float) -> int | None:
    """Return the bytes of the smallest further device, trusted and like the first one, with which the model fits."""
    name = "one more"
    if name in profile.names:
        return None
    wider = profile.with_copy(profile.names[0], name)
    *others, added = wider.devices
    trusted = any(each.device.trusted for each in profile.devices)

    def suffices(num_bytes: int) -> bool:
        device = dataclasses.replace(added.device, memory=num_bytes, trusted=added.device.trusted or trusted)
        devices = (*others, dataclasses.replace(added, device=device, free_bytes=None))
        return model_fits(dataclasses.replace(wider, devices=devices), workload, reserve)

    costs, model = WorkloadCosts(profile, workload, reserve), profile.model
    total = model.span_bytes(0, model.num_layers) + costs.kv_bytes(0, model.num_layers) + costs.working_bytes()
    low, high = 0, min(math.ceil(total / (1 - reserve)) + 1, MOST_BYTES)
    if not suffices(high):
        return None
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high

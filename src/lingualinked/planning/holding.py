"""Which parts of a model every stage holds, so that what they compute need not be sent.

Knows profiles and workloads; not which device holds which layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from lingualinked.profile import Profile
from lingualinked.transmission import ID_BYTES
from lingualinked.workload import Workload


def parts_to_hold(profile: Profile, workload: Workload) -> tuple[str, ...]:
    """Return the parts that every stage had better hold: those that take fewer bytes than their outputs in the workload.

    They need token ids everywhere, so that there are none where some devices are trusted and others are not.
    """
    if len({each.device.trusted for each in profile.devices}) > 1:
        return ()
    tokens = workload.num_rows * workload.num_tokens
    shortcuts = profile.model.transmission.shortcuts
    return tuple(each.name for each in shortcuts if 0 < each.part_bytes < (each.token_bytes - ID_BYTES) * tokens)


def with_parts_held(profile: Profile, parts: Collection[str]) -> Profile:
    """Return the profile of a model with every stage holding some parts, whose outputs are not sent then, and no others."""
    model = profile.model
    num_bytes = model.transmission.bytes_of(parts)
    held = dataclasses.replace(
        model,
        prologue_bytes=model.prologue_bytes - num_bytes,
        everywhere_bytes=model.everywhere_bytes + num_bytes,
        transmission=model.transmission.holding(parts, model.num_layers),
    )
    return dataclasses.replace(profile, model=held)

"""What one more device would change: one like the fastest of a profile, and one like their mean.

Knows profiles and how changed ones are weighed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from lingualinked.device import CALLER, Device
from lingualinked.link_profile import LinkProfile
from lingualinked.module_times import ModuleTimes
from lingualinked.planning.explaining import unused_name, weigh_change
from lingualinked.planning.explanation import WhatIf
from lingualinked.planning.plan import Plan
from lingualinked.profile import DeviceProfile, Profile


def weigh_one_more(plan: Plan) -> tuple[WhatIf, ...]:
    """Return what the best plan would do with one more device like the fastest one and, if they differ, like their mean."""
    profile = plan.measured
    fastest = min(profile.devices, key=lambda each: each.whole_step_s(profile.model, is_decode=True)[0]).device.name
    like_fastest = profile.with_copy(fastest, unused_name(f"{fastest}-2", profile))
    found = [weigh_change(plan, f"one more like {fastest!r}, the fastest", like_fastest)]
    if len(profile.devices) > 1:
        found.append(weigh_change(plan, "one more like their mean", with_mean(profile, unused_name("mean", profile))))
    return tuple(found)


def with_mean(profile: Profile, name: str) -> Profile:
    """Return a profile with one more device, which has the mean times, memory and links of the others."""
    devices = profile.devices
    finite = [each.capacity_bytes for each in devices if each.capacity_bytes < float("inf")]
    watts = [each.watts for each in devices if each.watts is not None]
    mean = DeviceProfile(
        device=Device(
            name=name,
            memory=max(1, int(statistics.mean(finite))) if len(finite) == len(devices) else None,
            watts=statistics.mean(watts) if len(watts) == len(devices) else None,
            trusted=all(each.device.trusted for each in devices),
        ),
        hardware="the mean of the others",
        layers=tuple(_mean_times([each.layers[kind] for each in devices]) for kind in range(len(profile.model.kinds))),
        stage=_mean_times([each.stage for each in devices]),
        prologue=_mean_times([each.prologue for each in devices]),
        epilogue=_mean_times([each.epilogue for each in devices]),
    )
    links = []
    for other in (CALLER, *profile.names):
        ends = [each for each in profile.names if each != other] or list(profile.names)
        there = [profile.link(each, other) for each in ends if each != other]
        back = [profile.link(other, each) for each in ends if each != other]
        if not there:  # the only device: as it is linked to the caller
            there, back = [profile.link(other, CALLER)], [profile.link(CALLER, other)]
        links += [_mean_link(there, name, other), _mean_link(back, other, name)]
    return dataclasses.replace(profile, devices=(*devices, mean), links=(*profile.links, *links))


def _mean_times(times: Sequence[ModuleTimes]) -> ModuleTimes:
    """Return the mean of times, in the shapes of the first."""
    return ModuleTimes(
        tuple(
            dataclasses.replace(
                step,
                seconds=statistics.mean(each.seconds(step.rows, step.tokens, step.context) for each in times),
                spread_s=0.0,
            )
            for step in times[0].steps
        )
    )


def _mean_link(links: Sequence[LinkProfile], source: str, target: str) -> LinkProfile:
    per_byte = [link.transfer_s(1) for link in links]
    mean = statistics.mean(per_byte)
    return LinkProfile(
        source=source,
        target=target,
        latency_s=statistics.mean(link.latency_s for link in links),
        bandwidth_bytes_per_s=1 / mean if mean > 0 else None,
    )

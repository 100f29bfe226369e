"""A profile that follows what running steps show: how devices and links are now.

Knows profiles and samples; decides nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lingualinked.control.speed import SpeedLevel
from lingualinked.device import CALLER
from lingualinked.link_profile import LinkProfile
from lingualinked.planning.scaling import scale_times
from lingualinked.planning.workload_costs import HEADER_BYTES, stage_s
from lingualinked.profile import DeviceProfile, Profile
from lingualinked.telemetry.samples import StageTiming, StepSample

_CONTEXT_STEP = 32  # tokens of context within which a step is taken to cost the same
_MOST_SHAPES = 4096  # of steps, whose predicted times are remembered


class DeviceEstimate:
    """One device: its speed in either phase, its memory, and whether it may be used."""

    def __init__(self, confidence: float, horizon_s: float) -> None:
        self.decode = SpeedLevel(confidence)
        self.prefill = SpeedLevel(confidence)
        self.seen_s: float | None = None
        self.is_forgotten = False
        self.remembered_s = horizon_s
        self.cap_bytes: float | None = None
        self.cap_until_s = 0.0
        self.is_usable = True

    @property
    def level(self) -> SpeedLevel:
        """The phase that tells more: decode, unless only prefill was seen."""
        return self.prefill if self.prefill.is_settled and not self.decode.is_settled else self.decode

    @property
    def is_settled(self) -> bool:
        """Whether its speed is known."""
        return self.level.is_settled and not self.is_forgotten

    def record_step(self, time_s: float) -> None:
        """Record that it has run a step."""
        self.seen_s = time_s
        if self.is_forgotten:
            self.is_forgotten = False
            self.remembered_s *= 2

    def forget_if_unseen(self, time_s: float) -> bool:
        """Forget its speed if its last step was long ago; return whether that is so now and was not before."""
        if self.is_forgotten or self.seen_s is None or time_s - self.seen_s <= self.remembered_s:
            return False
        self.is_forgotten = True
        return True

    def slowdowns(self, unseen: float, *, is_doubtful: bool) -> tuple[float, float]:
        """Return the slowdown of prefill and of decode, ``unseen`` where nothing was seen.

        One step tells more than a measurement that ``is_doubtful``.
        """
        if self.is_forgotten:
            return unseen, unseen
        known = self.level.slowdown if self.level.num_samples else unseen
        prefill, decode = (
            each.slowdown if each.is_settled or (is_doubtful and each.num_samples) else known
            for each in (self.prefill, self.decode)
        )
        return prefill, decode


class LiveProfile:
    """The devices and links of a profile, as steps have shown them since."""

    def __init__(self, profile: Profile, confidence: float, horizon_s: float) -> None:
        self._confidence = confidence
        self._horizon_s = horizon_s
        self._devices: dict[str, DeviceEstimate] = {}
        self._links: dict[tuple[str, str], SpeedLevel] = {}
        self._predicted_s: dict[tuple[object, ...], float] = {}
        self.extend(profile)

    def __getitem__(self, device: str) -> DeviceEstimate:
        return self._devices[device]

    def __contains__(self, device: str) -> bool:
        return device in self._devices

    def extend(self, profile: Profile) -> None:
        """Go on with a profile that has more devices; of those that are there already, estimates stay."""
        self.measured = profile
        self._measured_links = {(link.source, link.target): link for link in profile.links}
        self._predicted_s.clear()
        for name in profile.names:
            self._devices.setdefault(name, DeviceEstimate(self._confidence, self._horizon_s))
        for ends in self._measured_links:
            self._links.setdefault(ends, SpeedLevel(self._confidence))

    def observe(self, sample: StepSample) -> dict[str, float]:
        """Learn from a step; return the devices whose speed has shifted, and how many times as long they take now."""
        shifted: dict[str, float] = {}
        done_s = sample.end_s
        source, num_bytes = CALLER, HEADER_BYTES
        for stage in sample.stages:
            estimate = self._devices.get(stage.device)
            if estimate is None:
                return shifted
            estimate.record_step(done_s)
            level = estimate.decode if sample.is_decode else estimate.prefill
            before, was_settled = level.slowdown, level.is_settled
            if level.add(done_s, stage.compute_s, self._stage_s(stage, sample)) and was_settled:
                shifted[stage.device] = level.slowdown / before
            if source != stage.device:
                link = self._measured_links[source, stage.device]
                predicted_s = link.latency_s + link.transfer_s(num_bytes)
                self._links[source, stage.device].add(done_s, stage.hop_s, predicted_s)
            source, num_bytes = stage.device, stage.sent_bytes
        return shifted

    def forget_unused(self, time_s: float, used: Iterable[str]) -> list[str]:
        """Forget the speeds of devices that are not used and were seen long ago: they may be faster by now; return which."""
        idle = self._devices.keys() - set(used)
        return sorted(name for name in idle if self._devices[name].forget_if_unseen(time_s))

    def expected_stable_s(self, time_s: float, horizon_s: float, size: float) -> float:
        """Return the seconds for which no device is expected to shift by ``size`` (`SpeedLevel.expected_stable_s`)."""
        return min(estimate.level.expected_stable_s(time_s, horizon_s, size) for estimate in self._devices.values())

    def error(self, devices: Iterable[str]) -> float:
        """Return the largest standard error of the devices' speeds, as a share."""
        return max(self._devices[name].level.error for name in devices)

    def slowdowns(self) -> dict[str, float]:
        """Return how many times slower than measured each device decodes; of one that was never seen, what the best of the others has."""
        return {name: decode for name, (_, decode) in self._all_slowdowns().items()}

    def profile(self) -> Profile:
        """Return the profile of now."""
        slowdowns = self._all_slowdowns()
        return dataclasses.replace(
            self.measured,
            devices=tuple(self._device(each, *slowdowns[each.device.name]) for each in self.measured.devices),
            links=tuple(map(self._link, self.measured.links)),
            doubt=self._doubt(),
        )

    def unusable(self) -> tuple[str, ...]:
        """Return the devices on which nothing may be placed."""
        return tuple(name for name, estimate in self._devices.items() if not estimate.is_usable)

    def _all_slowdowns(self) -> dict[str, tuple[float, float]]:
        # Steps cost more in a pipeline than where layers are measured alone, on every device alike.
        unseen = min((each.level.slowdown for each in self._devices.values() if each.is_settled), default=1.0)
        is_doubtful = bool(self.measured.doubt)
        return {name: estimate.slowdowns(unseen, is_doubtful=is_doubtful) for name, estimate in self._devices.items()}

    def _doubt(self) -> str:
        """Say why the profile can't be trusted yet: steps settle the devices that run them."""
        settled = [name for name, estimate in self._devices.items() if estimate.is_settled]
        if not self.measured.doubt or len(settled) == len(self._devices):
            return ""
        corrected = f"; steps have corrected {', '.join(settled)} since" if settled else ""
        return self.measured.doubt + corrected

    def _device(self, device: DeviceProfile, prefill: float, decode: float) -> DeviceProfile:
        now = scale_times(device, prefill=prefill, decode=decode)
        cap = self._devices[device.device.name].cap_bytes
        return now if cap is None else dataclasses.replace(now, free_bytes=int(min(cap, device.capacity_bytes)))

    def _link(self, link: LinkProfile) -> LinkProfile:
        level = self._links[link.source, link.target]
        if not level.is_settled:
            return link
        rate = link.bandwidth_bytes_per_s
        return dataclasses.replace(
            link,
            latency_s=link.latency_s * level.slowdown,
            bandwidth_bytes_per_s=None if rate is None else rate / level.slowdown,
        )

    def _stage_s(self, stage: StageTiming, sample: StepSample) -> float:
        shape = (stage.device, stage.start, stage.end, sample.rows, sample.tokens, sample.context // _CONTEXT_STEP)
        seconds = self._predicted_s.get(shape)
        if seconds is None:
            if len(self._predicted_s) >= _MOST_SHAPES:
                self._predicted_s.clear()
            device = self.measured.device(stage.device)
            rows, tokens = sample.rows, sample.tokens
            seconds = stage_s(self.measured.model, device, stage.start, stage.end, rows, tokens, sample.context)
            self._predicted_s[shape] = seconds
        return seconds

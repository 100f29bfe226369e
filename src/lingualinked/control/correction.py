"""Corrects a doubtful profile by the steps that its devices have run since.

Knows profiles and samples; decides nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lingualinked.control.live_profile import LiveProfile
from lingualinked.control.policy import RebalancePolicy
from lingualinked.profile import Profile
from lingualinked.telemetry.samples import StepSample

_MOST_STEPS = 512  # that are looked back to


class Correction:
    """What steps say of one profile, as measured and doubtful; any thread may add to it."""

    def __init__(self, profile: Profile) -> None:
        policy = RebalancePolicy()
        self._lock = threading.Lock()
        self._live = LiveProfile(profile, policy.confidence, policy.horizon_s)
        self._corrected = self.measured = profile
        self.num_steps = 0

    def observe(self, num_steps: int, samples: Sequence[StepSample]) -> Profile:
        """Learn from steps, ``num_steps`` being those so far, and return the profile that follows."""
        with self._lock:
            new = samples[max(0, len(samples) - (num_steps - self.num_steps)) :]  # another thread may have been first
            for sample in new[-_MOST_STEPS:]:
                self._live.observe(sample)
            if num_steps > self.num_steps:
                self._corrected, self.num_steps = self._live.profile(), num_steps
            return self._corrected

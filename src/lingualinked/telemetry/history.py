"""What is remembered of a running pipeline: recent samples and decisions, and totals since it was started.

Plain data; knows neither how it is collected nor how it is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.samples import DeviceSample, StepSample
from lingualinked.telemetry.timeline import counted_steps, stage_intervals


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepCounters:
    """Steps of one kind since the pipeline was started.

    Parameters
    ----------
    num_steps : int
        Steps that came back.
    num_tokens : int
        Tokens that they ran, over all rows.
    total_s : float
        Seconds from issue to answer, summed over the steps.
    """

    num_steps: int = 0
    num_tokens: int = 0
    total_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounters:
    """What a device did since the pipeline was started, over all stages that it has hosted.

    Parameters
    ----------
    num_visits : int
        Steps, each counted once per stage.
    hop_s, wait_s, compute_s, codec_s : float
        Seconds of messages to it, of their wait, of compute, and of reading and writing messages.
    sent_bytes : int
        Bytes sent on, before encryption.
    """

    num_visits: int = 0
    hop_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    codec_s: float = 0.0
    sent_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Totals since the pipeline was started; they only grow, whatever the history forgets.

    Parameters
    ----------
    decode, prefill : StepCounters
        Steps of one new token per row, and the others.
    devices : mapping of str to DeviceCounters
        By the name of the device.
    num_moves, num_stays : int
        Decisions to move layers, and decisions not to.
    num_migrations, num_failed_migrations : int
        Migrations that succeeded, and those that were rolled back.
    num_moved_layers : int
        Layers moved by those that succeeded.
    stall_s : float
        The longest that one session waited for its switch, summed over the migrations.
    """

    decode: StepCounters = StepCounters()
    prefill: StepCounters = StepCounters()
    devices: Mapping[str, DeviceCounters] = dataclasses.field(default_factory=dict)
    num_moves: int = 0
    num_stays: int = 0
    num_migrations: int = 0
    num_failed_migrations: int = 0
    num_moved_layers: int = 0
    stall_s: float = 0.0

    @property
    def num_steps(self) -> int:
        """Steps that came back."""
        return self.decode.num_steps + self.prefill.num_steps

    @property
    def num_tokens(self) -> int:
        """Tokens that were run, over all rows."""
        return self.decode.num_tokens + self.prefill.num_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The recent past of a pipeline, oldest first.

    Parameters
    ----------
    start_s : float
        When recording began, on the caller's monotonic clock, as all times here.
    steps : tuple of StepSample
        In the order in which they came back.
    devices : tuple of DeviceSample
        Looks at devices.
    decisions : tuple of Decision
        Every decision, ``"stay"`` too.
    migrations : tuple of Migration
        Migrations and attempts at them.
    counters : Counters
        Totals since `start_s`.
    """

    start_s: float = 0.0
    steps: tuple[StepSample, ...] = ()
    devices: tuple[DeviceSample, ...] = ()
    decisions: tuple[Decision, ...] = ()
    migrations: tuple[Migration, ...] = ()
    counters: Counters = dataclasses.field(default_factory=Counters)

    @property
    def end_s(self) -> float:
        """When the last step came back; `start_s` if none has."""
        return max((step.time_s + step.total_s for step in self.steps), default=self.start_s)

    def tokens_per_s(self, window_s: float = 10.0) -> float:
        """Return the new tokens per second, in the seconds before the last step came back.

        Tokens of decode steps are counted; where none is remembered, those of all steps.

        Parameters
        ----------
        window_s : float
            Seconds to look back; not beyond the first step that is remembered.

        Returns
        -------
        float
            Tokens per second over all rows and sessions; 0 if nothing is remembered.
        """
        begin_s, end_s = self._window(window_s)
        tokens = sum(
            step.rows * step.tokens * _share(step.time_s, step.time_s + step.total_s, begin_s, end_s)
            for step in counted_steps(self.steps)
        )
        return tokens / (end_s - begin_s) if end_s > begin_s else 0.0

    def utilisation(self, window_s: float = 10.0) -> dict[str, float]:
        """Return the share of time that each device was busy, in the seconds before the last step came back.

        Parameters
        ----------
        window_s : float
            Seconds to look back; not beyond the first step that is remembered.

        Returns
        -------
        dict of str to float
            Between 0 and 1, of each device that a remembered step has passed; in pipeline order.
        """
        begin_s, end_s = self._window(window_s)
        busy_s: dict[str, float] = {}
        for step in reversed(self.steps):
            for interval in stage_intervals(step):
                inside_s = max(0.0, min(interval.end_s, end_s) - max(interval.start_s, begin_s))
                busy_s[interval.device] = busy_s.get(interval.device, 0.0) + inside_s
        length_s = end_s - begin_s
        return {device: min(1.0, each_s / length_s) if length_s > 0 else 0.0 for device, each_s in busy_s.items()}

    def latest_devices(self) -> dict[str, DeviceSample]:
        """Return the last look at each device, by its name."""
        return {sample.device: sample for sample in self.devices}

    def _window(self, window_s: float) -> tuple[float, float]:
        end_s = self.end_s
        first_s = min((step.time_s for step in self.steps), default=end_s)
        return max(end_s - window_s, first_s), end_s


def _share(start_s: float, stop_s: float, begin_s: float, end_s: float) -> float:
    """Return the part of one interval that lies in another; of an instant, all or nothing."""
    if stop_s <= start_s:
        return 1.0 if begin_s <= start_s <= end_s else 0.0
    return max(0.0, min(stop_s, end_s) - max(start_s, begin_s)) / (stop_s - start_s)

"""The history of a running pipeline: recent samples and decisions, and totals since the start.

Plain data; knows neither how it is collected nor how it is displayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.samples import DeviceSample, StepSample
from lingualinked.telemetry.timeline import counted_steps, stage_intervals


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepCounters:
    """Totals of one kind of step since the pipeline was started.

    Parameters
    ----------
    num_steps : int
        Completed steps.
    num_tokens : int
        Tokens of these steps, over all rows.
    total_s : float
        Sum of the seconds from request to answer.
    """

    num_steps: int = 0
    num_tokens: int = 0
    total_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounters:
    """Totals of a device since the pipeline was started, over all stages that it has hosted.

    Parameters
    ----------
    num_visits : int
        Steps, counted once per stage.
    hop_s, wait_s, compute_s, codec_s : float
        Seconds of transmission to the device, of waiting, of compute, and of encoding and decoding.
    sent_bytes : int
        Bytes sent to the next stage, before encryption.
    """

    num_visits: int = 0
    hop_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    codec_s: float = 0.0
    sent_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Totals since the pipeline was started; they never decrease, unlike the bounded history.

    Parameters
    ----------
    decode, prefill : StepCounters
        Steps of one new token per row, and all others.
    devices : mapping of str to DeviceCounters
        By the name of the device.
    num_moves, num_stays : int
        Decisions to move layers, and decisions to stay.
    num_migrations, num_failed_migrations : int
        Migrations that succeeded, and that were rolled back.
    num_moved_layers : int
        Layers moved by successful migrations.
    stall_s : float
        The longest wait of a session for its switch, summed over the migrations.
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
        """Completed steps."""
        return self.decode.num_steps + self.prefill.num_steps

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps, over all rows."""
        return self.decode.num_tokens + self.prefill.num_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The recent past of a pipeline, oldest first.

    Parameters
    ----------
    start_s : float
        Start of the recording, on the caller's monotonic clock, like all times here.
    steps : tuple of StepSample
        In the order of completion.
    devices : tuple of DeviceSample
        Samples of devices: memory, CPU, temperature, battery.
    decisions : tuple of Decision
        Every decision, including ``"stay"``.
    migrations : tuple of Migration
        Successful and failed migrations.
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
        """Time of the last completed step; `start_s` if there is none."""
        return max((step.end_s for step in self.steps), default=self.start_s)

    def tokens_per_s(self, window_s: float = 10.0) -> float:
        """Return the new tokens per second, over the seconds before the last completed step.

        Counts the tokens of decode steps; if the history has none, those of all steps.

        Parameters
        ----------
        window_s : float
            Length of the window in seconds; it does not begin before the first step in the history.

        Returns
        -------
        float
            Tokens per second over all rows and sessions; 0 without steps.
        """
        begin_s, end_s = self._window(window_s)
        tokens = sum(
            step.rows * step.tokens * _share(step.time_s, step.end_s, begin_s, end_s)
            for step in counted_steps(self.steps)
        )
        return tokens / (end_s - begin_s) if end_s > begin_s else 0.0

    def utilisation(self, window_s: float = 10.0) -> dict[str, float]:
        """Return the fraction of time that each device was busy, over the seconds before the last completed step.

        Parameters
        ----------
        window_s : float
            Length of the window in seconds; it does not begin before the first step in the history.

        Returns
        -------
        dict of str to float
            Between 0 and 1, for each device in the steps of the history; in pipeline order.
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
        """Return the latest sample of each device, by its name."""
        return {sample.device: sample for sample in self.devices}

    def _window(self, window_s: float) -> tuple[float, float]:
        end_s = self.end_s
        first_s = min((step.time_s for step in self.steps), default=end_s)
        return max(end_s - window_s, first_s), end_s


def _share(start_s: float, stop_s: float, begin_s: float, end_s: float) -> float:
    """Return the fraction of an interval that lies in another; an instant is all or nothing."""
    if stop_s <= start_s:
        return 1.0 if begin_s <= start_s <= end_s else 0.0
    return max(0.0, min(stop_s, end_s) - max(start_s, begin_s)) / (stop_s - start_s)

"""What one step, and one look at a device, tell: the samples that everything live is made from.

Knows numbers only; seconds of one clock each, never compared across machines.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageTiming:
    """One stage's part in one step.

    Parameters
    ----------
    device : str
        Name of the device that hosts it.
    start, end : int
        Its half-open layer range.
    hop_s : float
        Seconds that the step's message was on its way to the stage.
    wait_s : float
        Seconds that it waited there for the stage to be free.
    compute_s : float
        Seconds of compute.
    codec_s : float
        Seconds spent reading the message and writing the next one.
    sent_bytes : int
        Bytes of the message that it sent on, before encryption.
    """

    device: str
    start: int
    end: int
    hop_s: float
    wait_s: float
    compute_s: float
    codec_s: float
    sent_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds from the party before to the end of this stage's work."""
        return self.hop_s + self.wait_s + self.compute_s + self.codec_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """One step through all stages.

    Parameters
    ----------
    time_s : float
        When the caller issued it, on its monotonic clock.
    session, number : int
        The session, and the number of the step in it.
    plan_version : int
        Epoch of the plan that it ran under.
    rows, tokens, context : int
        Rows of the batch, new tokens of each, and tokens of each that were in the KV cache already.
    total_s : float
        Seconds from issue to answer, on the caller's clock.
    stages : tuple of StageTiming
        In pipeline order.
    """

    time_s: float
    session: int
    number: int
    plan_version: int
    rows: int
    tokens: int
    context: int
    total_s: float
    stages: tuple[StageTiming, ...]

    @property
    def return_s(self) -> float:
        """Seconds of the way back to the caller, and of whatever no stage accounts for."""
        return max(0.0, self.total_s - sum(stage.total_s for stage in self.stages))

    @property
    def is_decode(self) -> bool:
        """Whether it ran one new token per row."""
        return self.tokens == 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSample:
    """One look at a device and its worker.

    Parameters
    ----------
    time_s : float
        When it was asked for, on the caller's monotonic clock.
    device : str
        Its name.
    held_bytes : int
        Weights and KV of the stages that its worker hosts, of all models.
    available_bytes : int
        Memory that its stages could still take: what the device's limit leaves, or what the machine has free, whichever is
        less.
    cpu_percent : float
        Of one core, by the worker, since the look before.
    temperature_c : float or None
        Of the hottest sensor; ``None`` where the machine reports none.
    battery_percent : float or None
        ``None`` where there is none.
    on_battery : bool
        Whether it runs from its battery.
    """

    time_s: float
    device: str
    held_bytes: int
    available_bytes: int
    cpu_percent: float
    temperature_c: float | None = None
    battery_percent: float | None = None
    on_battery: bool = False

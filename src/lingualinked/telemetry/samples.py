"""Samples of steps and devices, from which all live figures are computed.

Plain data. Each duration is measured on one clock; clocks of different machines are never compared.
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
        Seconds of transmission of the step's message to the stage. From another host, whose clock is not compared: an equal
        part of what the step took beyond all that stages measured.
    wait_s : float
        Seconds that the message waited for the stage to be free.
    compute_s : float
        Seconds of compute.
    codec_s : float
        Seconds of decoding the message and encoding the next one.
    sent_bytes : int
        Bytes of the message to the next stage, before encryption.
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
        """Seconds from sending by the previous party to the end of this stage's work."""
        return self.hop_s + self.wait_s + self.compute_s + self.codec_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """One step through all stages.

    Parameters
    ----------
    time_s : float
        Time of the request, on the caller's monotonic clock.
    session, number : int
        The session, and the number of the step within it.
    plan_version : int
        Version of the plan that it ran under.
    rows, tokens, context : int
        Rows of the batch, new tokens per row, and tokens per row that were in the KV cache before.
    total_s : float
        Seconds from request to answer, on the caller's clock.
    stages : tuple of StageTiming
        In pipeline order.
    microbatch : int or None
        Which microbatch of its batch the rows are, from 0 on; ``None`` if they are the whole batch.
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
    microbatch: int | None = None

    @property
    def end_s(self) -> float:
        """Time of the answer."""
        return self.time_s + self.total_s

    @property
    def return_s(self) -> float:
        """Seconds of the return to the caller, and of everything that no stage accounts for."""
        return max(0.0, self.total_s - sum(stage.total_s for stage in self.stages))

    @property
    def is_decode(self) -> bool:
        """Whether it had one new token per row."""
        return self.tokens == 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSample:
    """A sample of a device and its worker.

    Parameters
    ----------
    time_s : float
        Time of the request, on the caller's monotonic clock.
    device : str
        Name of the device.
    held_bytes : int
        Bytes of weights and KV of all stages that its worker hosts.
    available_bytes : int
        Bytes that its stages could still use: the rest of the device's limit, or the machine's free memory, whichever is
        less.
    cpu_percent : float
        CPU usage of the worker since the previous sample, in per cent of one core.
    temperature_c : float or None
        Temperature of the hottest sensor; ``None`` if the machine reports none.
    battery_percent : float or None
        Charge of the battery; ``None`` if there is none.
    on_battery : bool
        Whether the device runs on battery.
    """

    time_s: float
    device: str
    held_bytes: int
    available_bytes: int
    cpu_percent: float
    temperature_c: float | None = None
    battery_percent: float | None = None
    on_battery: bool = False

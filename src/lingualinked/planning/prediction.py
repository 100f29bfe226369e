"""What a plan is predicted to do: seconds and bytes of its stages, hops and devices under one workload.

Plain results, and what follows from them; knows neither plans nor what parts cost.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from typing import Any

from lingualinked.planning.prefill_prediction import Halt, pass_chunks
from lingualinked.quantities import count_text, seconds_text
from lingualinked.shown import Printed
from lingualinked.workload import Objective, Workload

_PLAINLY = 1.05  # times as many tokens per second


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """One stage.

    Parameters
    ----------
    device : str
        Name of its device.
    start, end : int
        Its half-open layer range.
    chunks_s : tuple of float
        Seconds of compute of each chunk of a microbatch's prefill; of the whole, if that is not cut.
    decode_s : float
        Seconds of compute of its decode step at the workload's mean context.
    weight_bytes, kv_bytes, working_bytes : int
        What it holds: weights, KV of all sessions in flight, intermediate results.
    """

    device: str
    start: int
    end: int
    chunks_s: tuple[float, ...]
    decode_s: float
    weight_bytes: int
    kv_bytes: int
    working_bytes: int

    @property
    def prefill_s(self) -> float:
        """Seconds of compute of all chunks of a microbatch's prefill."""
        return sum(self.chunks_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HopPrediction:
    """One hop: from the caller to the first stage, between stages, or back to the caller.

    Parameters
    ----------
    source, target : str
        Names of devices, or of the caller.
    latency_s : float
        Seconds on the way, whatever the size.
    chunk_transfers_s : tuple of float
        Seconds in which the link is busy with the message of each chunk of a prefill.
    decode_transfer_s : float
        The same of a decode step's.
    """

    source: str
    target: str
    latency_s: float
    chunk_transfers_s: tuple[float, ...]
    decode_transfer_s: float

    @property
    def prefill_transfer_s(self) -> float:
        """Seconds in which the link is busy with all messages of a prefill."""
        return sum(self.chunk_transfers_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShortcutPrediction:
    """What a stage gets beside hidden states from one other stage, which the step waits for.

    Parameters
    ----------
    stage : int
        Index of the stage that uses it.
    source, target : str
        Names of the devices.
    names : tuple of str
        Names of the shortcuts, as in the transmission map.
    token_bytes : int
        Bytes per row and token, of all of them.
    chunk_transfers_s : tuple of float
        Seconds in which the link carries what belongs to each chunk of a prefill.
    decode_transfer_s : float
        The same of a decode step.
    """

    stage: int
    source: str
    target: str
    names: tuple[str, ...]
    token_bytes: int
    chunk_transfers_s: tuple[float, ...]
    decode_transfer_s: float

    @property
    def prefill_transfer_s(self) -> float:
        """Seconds in which the link is busy with it in a prefill."""
        return sum(self.chunk_transfers_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DevicePrediction:
    """One device.

    Parameters
    ----------
    device : str
        Its name.
    used_bytes : int
        What its stages hold.
    capacity_bytes : int or None
        Its memory; ``None``: not known to be limited.
    busy_s : float
        Seconds of compute of a mean step.
    watts : float or None
        Power while it computes, given or measured.
    """

    device: str
    used_bytes: int
    capacity_bytes: int | None
    busy_s: float
    watts: float | None

    @property
    def left_bytes(self) -> int | None:
        """Memory that is left; ``None`` if it is not known to be limited."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.used_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction(Printed):
    """A plan under a workload.

    A mean step gives one token for each row of a session, whose microbatches pass through the stages one after the other.

    Parameters
    ----------
    workload : Workload
        What it is predicted for, with the number of microbatches.
    stages : tuple of StagePrediction
        In pipeline order.
    hops : tuple of HopPrediction
        From the caller through the stages and back.
    devices : tuple of DevicePrediction
        Devices in use, each once.
    shortcuts : tuple of ShortcutPrediction
        What skips stages, by the stage that uses it.
    """

    workload: Workload
    stages: tuple[StagePrediction, ...]
    hops: tuple[HopPrediction, ...]
    devices: tuple[DevicePrediction, ...]
    shortcuts: tuple[ShortcutPrediction, ...] = ()

    @property
    def step_s(self) -> float:
        """Seconds of a decode step of one microbatch, from the caller through all stages and back."""
        compute = sum(stage.decode_s for stage in self.stages)
        sent = sum(shortcut.decode_transfer_s for shortcut in self.shortcuts)
        return compute + sent + sum(hop.latency_s + hop.decode_transfer_s for hop in self.hops)

    @property
    def first_token_s(self) -> float:
        """Seconds from a session's prompts to the first token of each, with nothing else in flight."""
        return self._prefill_s + (self._num_microbatches - 1) * self.busiest_s(is_decode=False)

    @property
    def request_s(self) -> float:
        """Seconds of a whole request, with nothing else in flight."""
        step_s = max(self.step_s, self._num_microbatches * self.busiest_s(is_decode=True))
        return self.first_token_s + (self.workload.new_tokens - 1) * step_s

    def busiest_s(self, *, is_decode: bool) -> float:
        """Seconds for which a prefill or a decode step keeps one device or link busy, at most."""
        devices: defaultdict[str, float] = defaultdict(float)
        for stage in self.stages:
            devices[stage.device] += stage.decode_s if is_decode else stage.prefill_s
        links: defaultdict[tuple[str, str], float] = defaultdict(float)
        for each in self._sendings:
            links[each.source, each.target] += each.decode_transfer_s if is_decode else each.prefill_transfer_s
        return max(*devices.values(), *links.values())

    @property
    def _prefill_s(self) -> float:
        """Seconds of a microbatch's prefill, from the caller through all stages and back; its chunks follow each other."""
        halts: list[Halt] = []
        for index, (hop, stage) in enumerate(itertools.zip_longest(self.hops, self.stages)):
            halts.append((hop.chunk_transfers_s, hop.latency_s))
            halts += [(shortcut.chunk_transfers_s, 0.0) for shortcut in self.shortcuts if shortcut.stage == index]
            halts += [] if stage is None else [(stage.chunks_s, 0.0)]
        return pass_chunks(halts)

    @property
    def _sendings(self) -> list[HopPrediction | ShortcutPrediction]:
        return [*self.hops, *self.shortcuts]

    @property
    def _num_microbatches(self) -> int:
        return self.workload.num_microbatches or 1

    @property
    def bottleneck_s(self) -> float:
        """Seconds of a mean step that the busiest device or link needs; a full pipeline gives one step per so long."""
        return max(self._seconds())[0]

    @property
    def bottleneck(self) -> str:
        """The busiest device or link."""
        return max(self._seconds())[1]

    @property
    def is_latency_bound(self) -> bool:
        """Whether the workload's sessions are too few to keep the busiest device or link busy all the time."""
        return self.latency_s / self.workload.num_sessions > self.bottleneck_s

    @property
    def limited_by(self) -> str:
        """The device or link that limits the tokens per second with the workload's sessions in flight.

        The busiest one where the sessions keep it busy all the time; else the one on which a step spends most time.
        """
        return max(self._seconds(with_latency=True))[1] if self.is_latency_bound else self.bottleneck

    def seconds_of(self, part: str) -> float:
        """Seconds of a mean step on a device or link, by its name as in `limited_by`."""
        return next(seconds for seconds, name in self._seconds(with_latency=True) if name == part)

    @property
    def stream_tokens_per_s(self) -> float:
        """Tokens per second of one session's rows, with nothing else in flight; prefill included."""
        return self.workload.batch_size * self.workload.new_tokens / self.request_s

    @property
    def pipeline_tokens_per_s(self) -> float:
        """Tokens per second of all rows with the pipeline full: as many sessions in flight as it takes."""
        return self.workload.batch_size / self.bottleneck_s

    @property
    def latency_s(self) -> float:
        """Seconds of a mean step from the caller through all stages and back, with nothing else in flight."""
        return self.request_s / self.workload.new_tokens

    @property
    def interval_s(self) -> float:
        """Seconds between two mean steps with the workload's sessions in flight.

        The larger of the bottleneck and of the latency divided by the sessions: what ``objective="throughput"``
        minimises. Sessions wait for each other where their steps meet, which `simulate` shows and this does not.
        """
        return max(self.bottleneck_s, self.latency_s / self.workload.num_sessions)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all rows with the workload's sessions in flight, at most: the rate of `interval_s`."""
        return self.workload.batch_size / self.interval_s

    @property
    def sessions_to_fill(self) -> int:
        """Sessions in flight from which on the bottleneck limits, and not the way of each session's steps."""
        return max(1, math.ceil(self.latency_s / self.bottleneck_s * (1 - 1e-9)))

    @property
    def joules_per_token(self) -> float | None:
        """Energy of computing one token, if every device's power is known."""
        joules = 0.0
        for device in self.devices:
            if device.watts is None:
                return None
            joules += device.watts * device.busy_s
        return joules / self.workload.batch_size

    def mean(self, prefill: float, decode: float) -> float:
        """Mean over the steps of a request."""
        return (prefill + (self.workload.new_tokens - 1) * decode) / self.workload.new_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return everything as nested plain Python data, derived figures included."""
        figures = (
            "step_s",
            "first_token_s",
            "request_s",
            "latency_s",
            "bottleneck_s",
            "bottleneck",
            "interval_s",
            "limited_by",
            "stream_tokens_per_s",
            "pipeline_tokens_per_s",
            "tokens_per_s",
            "joules_per_token",
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in figures}

    @property
    def lines(self) -> list[str]:
        """What is predicted, in sentences."""
        workload = self.workload
        hops = sum(hop.latency_s + hop.decode_transfer_s for hop in self.hops)
        hops += sum(shortcut.decode_transfer_s for shortcut in self.shortcuts)
        sessions, rows = count_text(workload.num_sessions, "session"), count_text(workload.batch_size, "row")
        split = "" if self._num_microbatches == 1 else f" in {self._num_microbatches} microbatches"
        size = workload.prefill_chunk_size
        chunks = "" if size is None else f" (in chunks of {size})"
        asked = f"{sessions} of {rows}{split}, {workload.prompt_tokens:,} prompt{chunks} + {workload.new_tokens:,} new tokens"
        first, step, between = map(seconds_text, (self.first_token_s, self.step_s, hops))
        now, full = self.tokens_per_s, self.pipeline_tokens_per_s
        notes = [
            f"for {asked}, predicted: first token after {first}, then {step} a step, {between} of it between stages",
            f"{now:.1f} tokens/s with {sessions} in flight, limited by {self.limited_by}",
        ]
        if workload.num_sessions > 1:
            notes.append(f"{self.stream_tokens_per_s:.1f} tokens/s with 1 session in flight")
        if self.sessions_to_fill > workload.num_sessions and full > _PLAINLY * now:
            filling = f"from {count_text(self.sessions_to_fill, 'session')} on"
            notes.append(f"{full:.1f} tokens/s with the pipeline full, {filling}, limited by {self.bottleneck}")
        if self.joules_per_token is not None:
            notes.append(f"{self.joules_per_token:.3g} J per token")
        return notes

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def _seconds(self, *, with_latency: bool = False) -> list[tuple[float, str]]:
        """List the seconds of a mean step on each device and each link; latency keeps no link busy."""
        seconds = [(device.busy_s, f"device {device.device!r}") for device in self.devices]
        links: defaultdict[str, float] = defaultdict(float)
        for each in self._sendings:
            busy_s = self._num_microbatches * self.mean(each.prefill_transfer_s, each.decode_transfer_s)
            latency_s = each.latency_s if with_latency and isinstance(each, HopPrediction) else 0.0
            links[f"link {each.source!r} -> {each.target!r}"] += latency_s + busy_s
        return seconds + [(busy_s, name) for name, busy_s in links.items()]


def value_of(predicted: Prediction, objective: Objective) -> float:
    """Return what an objective minimises, of a mean step: joules where powers are known, else seconds."""
    joules = predicted.joules_per_token
    return joules if objective == "energy" and joules is not None else step_s_of(predicted, objective)


def step_s_of(predicted: Prediction, objective: Objective) -> float:
    """Return the seconds of a mean step: on its way for latency, else from one to the next."""
    return predicted.latency_s if objective == "latency" else predicted.interval_s

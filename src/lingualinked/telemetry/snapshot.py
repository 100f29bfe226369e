"""A snapshot of a model's stages and the workers that host them.

Knows how to describe itself, not how it was measured.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageSnapshot:
    """One stage as its worker reports it.

    Parameters
    ----------
    device : str
        Name of the device that hosts it.
    start, end : int
        Its half-open layer range.
    weight_bytes, kv_bytes : int
        Bytes of its weights, and of the KV cache that it holds for live sessions.
    num_sessions, num_steps : int
        Sessions that hold KV now, and steps run since it was loaded.
    compute_s : float
        Seconds spent computing those steps.
    sent_bytes : int
        Bytes sent to the next stage (or, from the last one, to the caller) before encryption.
    """

    device: str
    start: int
    end: int
    weight_bytes: int
    kv_bytes: int
    num_sessions: int
    num_steps: int
    compute_s: float
    sent_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One worker process.

    Parameters
    ----------
    device : str
        Name of its device.
    pid : int
        Process id.
    threads : int
        Threads that it computes with.
    resident_bytes, idle_resident_bytes : int
        Resident memory now, and when it had started and held nothing.
    num_refused : int
        Messages that it refused as malformed, unknown or late.
    """

    device: str
    pid: int
    threads: int
    resident_bytes: int
    idle_resident_bytes: int
    num_refused: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What a model's pipeline has done so far.

    Parameters
    ----------
    stages : tuple of StageSnapshot
        In pipeline order.
    workers : tuple of WorkerSnapshot
        The workers that host them, each once.
    """

    stages: tuple[StageSnapshot, ...]
    workers: tuple[WorkerSnapshot, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as nested plain Python data."""
        return dataclasses.asdict(self)

    def plot(self) -> Figure:
        """Draw memory and compute time per worker (needs matplotlib: ``pip install lingualinked[plot]``)."""
        from lingualinked.display.telemetry import telemetry_figure  # plain data that can be drawn

        return telemetry_figure(self)

    def __str__(self) -> str:
        from lingualinked.display.telemetry import telemetry_text

        return telemetry_text(self)

    def _repr_html_(self) -> str:
        from lingualinked.display.telemetry import telemetry_html

        return telemetry_html(self)

"""What workers report of themselves and of the stages that they host.

Plain data; knows neither how it is asked for nor how it is shown.
"""

from __future__ import annotations

import dataclasses


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
        Messages that it refused as malformed, unknown or late, and connections that showed no authorised key.
    """

    device: str
    pid: int
    threads: int
    resident_bytes: int
    idle_resident_bytes: int
    num_refused: int

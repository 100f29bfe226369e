"""Snapshots that workers report of themselves and of their stages.

Plain data; knows neither how it is requested nor how it is displayed.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageSnapshot:
    """A stage, as reported by its worker.

    Parameters
    ----------
    device : str
        Name of the device that hosts it.
    start, end : int
        Its half-open layer range.
    weight_bytes, kv_bytes : int
        Bytes of its weights, and of the KV cache of live sessions.
    num_sessions, num_steps : int
        Sessions with KV at present, and steps since it was loaded.
    compute_s : float
        Seconds of compute in these steps.
    sent_bytes : int
        Bytes sent to the next stage (by the last one: to the caller), before encryption.
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
    """A worker process, as reported by itself.

    Parameters
    ----------
    device : str
        Name of its device.
    pid : int
        Process id.
    threads : int
        Threads that it computes with.
    resident_bytes, idle_resident_bytes : int
        Resident memory now, and after the start, before anything was loaded.
    num_refused : int
        Messages refused as malformed, unknown or late, and connections without an authorised key.
    """

    device: str
    pid: int
    threads: int
    resident_bytes: int
    idle_resident_bytes: int
    num_refused: int

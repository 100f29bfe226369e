"""What a daemon was asked to do when it was started.

Knows numbers and texts, all checked; not how they were given.
"""

from __future__ import annotations

import dataclasses

from lingualinked.address import Address


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DaemonOptions:
    """The options of ``lingualinked worker``."""

    bind: Address  # port 0: any free one
    name: str
    memory_bytes: int | None  # that all workers together may take; None: no limit
    threads: int  # that a worker computes with, unless its device states fewer
    accelerator: str
    models: str | None  # folder of checkpoints
    cache: str  # folder of weights that were fetched
    cache_bytes: int  # of it on disk; 0: nothing is kept
    verifies: bool  # checkpoints by all their bytes
    allows_code: bool  # beside checkpoints in `models` or the hub's cache, to be run where a caller asks for it
    ports: tuple[int, int] | None  # first and last one at which workers may listen
    advertise: str | None
    allows_relays: bool
    announces: bool  # itself in the local network
    serves_once: bool
    wait_s: float | None  # for the caller that is served once
    clients: tuple[str, ...]  # public keys that are let in for this run, beside the list of authorised ones
    has_lifeline: bool  # ends when its standard input is closed

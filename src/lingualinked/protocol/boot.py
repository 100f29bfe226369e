"""The messages with which the caller starts worker processes: over sockets, never in arguments or the environment.

Knows the messages, not how they are used. `lingualinked.worker.__main__` reads the line before them, the import path.
"""

from __future__ import annotations

import msgspec

GRACE_S = 2.0
"""Seconds that workers have to end by themselves before they are killed."""


class Preload(msgspec.Struct, frozen=True, kw_only=True):
    """The first message to a started process: what to import before it forks workers, or becomes one.

    Parameters
    ----------
    caller_pid : int
        The process whose end ends this one.
    forks : bool
        Whether the process forks workers for the clusters whose sockets follow, or becomes a single worker.
    socket_folder : str
        The folder to remove once the caller has ended.
    class_names : tuple of str
        transformers classes whose code the workers will need.
    """

    caller_pid: int
    forks: bool
    socket_folder: str
    class_names: tuple[str, ...] = ()


class ForkWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's request to fork one worker, sent with the socket over which that worker alone receives its `Boot`.

    Parameters
    ----------
    name : str
        The device's name.
    class_names : tuple of str
        transformers classes to import before the worker is forked.
    """

    name: str
    class_names: tuple[str, ...] = ()


class EmulatedLink(msgspec.Struct, frozen=True, kw_only=True):
    """An emulated link to another party.

    Parameters
    ----------
    target : str
        The party's name.
    bandwidth_bytes_per_s : float or None
        ``None``: unlimited (JSON has no infinity).
    latency_s : float
        One way.
    """

    target: str
    bandwidth_bytes_per_s: float | None
    latency_s: float


class Emulation(msgspec.Struct, frozen=True, kw_only=True):
    """The slower device that a worker emulates.

    Parameters
    ----------
    slowdown : float
        How many times slower it computes.
    links : tuple of EmulatedLink
        Its outgoing links.
    delayed_from : tuple of str
        Parties whose messages the worker holds until they would have arrived.
    """

    slowdown: float
    links: tuple[EmulatedLink, ...]
    delayed_from: tuple[str, ...]


class WorkerKey(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's first message: the caller authorises this key and answers with the worker's `Boot`.

    Parameters
    ----------
    public_key : str
        Public half of a new CURVE key pair (Z85 text). The secret half never leaves the process.
    """

    public_key: str


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's configuration, sent to that worker alone: its identity, its caller and its limits.

    Parameters
    ----------
    name : str
        The device's name.
    socket_folder : str
        Where to create its own socket; the worker removes the folder once the caller has ended.
    caller_address, caller_key : str
        Where the caller's inbox listens, and its public key.
    caller_pid : int
        The process whose end ends this worker.
    accelerator : str
        The device that its stages compute on.
    threads : int
        Number of threads that it computes with.
    cpus : tuple of int or None
        Cores that it is pinned to.
    memory_bytes : int or None
        Limit on its memory beyond that of an idle worker; ``None``: no limit.
    max_frame_bytes : int
        Largest frame that it sends or receives.
    log_level : int
        Lowest level of the log records that it sends to the caller.
    emulation : Emulation
        The device that it emulates at first.
    """

    name: str
    socket_folder: str
    caller_address: str
    caller_key: str
    caller_pid: int
    accelerator: str
    threads: int
    cpus: tuple[int, ...] | None
    memory_bytes: int | None
    max_frame_bytes: int
    log_level: int
    emulation: Emulation


class WorkerForked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker has been forked; its pidfd is sent with this message."""

    name: str
    pid: int


class WorkerEnded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A forked worker has ended, with the status that ``waitpid`` returned."""

    pid: int
    status: int

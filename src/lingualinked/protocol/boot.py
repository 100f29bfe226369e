"""The messages with which the caller starts worker processes: over sockets, never in arguments or the environment.

Knows the messages, not how they are used. `lingualinked.worker.__main__` reads the line before them, the import path.
"""

from __future__ import annotations

import msgspec

from lingualinked.transport.sockets.tcp_listener import TcpEndpoint

GRACE_S = 2.0
"""Seconds that workers have to end by themselves before they are killed."""


class Preload(msgspec.Struct, frozen=True, kw_only=True):
    """The first message to a started process: what to import before it forks workers, or becomes one."""

    caller_pid: int  # the process whose end ends this one
    forks: bool  # workers for the clusters whose sockets follow; or it becomes a single worker
    socket_folder: str  # to remove once the caller has ended
    class_names: tuple[str, ...] = ()  # transformers classes whose code the workers will need


class ForkWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's request to fork one worker, sent with the socket over which that worker alone receives its `Boot`."""

    name: str
    class_names: tuple[str, ...] = ()  # transformers classes to import before the worker is forked


class EmulatedLink(msgspec.Struct, frozen=True, kw_only=True):
    """An emulated link to another party."""

    target: str
    bandwidth_bytes_per_s: float | None  # None: unlimited (JSON has no infinity)
    latency_s: float  # one way


class Emulation(msgspec.Struct, frozen=True, kw_only=True):
    """The slower device that a worker emulates."""

    slowdown: float  # how many times slower it computes
    links: tuple[EmulatedLink, ...]  # outgoing
    delayed_from: tuple[str, ...]  # parties whose messages the worker holds until they would have arrived


class WorkerKey(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's first message: the caller authorises this key and answers with the worker's `Boot`."""

    public_key: str  # of a new CURVE key pair (Z85 text); the secret half never leaves the process


class WeightFolders(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker that does not read the caller's files has weights of its own."""

    models: str | None  # a folder with copies of checkpoints
    cache: str  # for what it fetches
    cache_bytes: int  # the most that the cache may take; 0: nothing is kept
    verifies: bool = False  # compares all bytes of what it loads with the caller's
    allows_code: bool = False  # beside checkpoints there, to be run where the caller asks for it
    owner: str = (
        ""  # of what it fetches, which no worker of another owner is given: the public key of the caller's client
    )


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's configuration, sent to that worker alone: its identity, its caller and its limits.

    What depends on the worker's host comes from the process that starts it there: the caller, or a daemon.
    """

    name: str
    socket_folder: str  # of its socket; the worker removes the folder once the process that started it has ended
    caller_address: str
    caller_key: str
    starter_pid: int  # the process whose end ends this worker
    same_host: bool  # as the caller: whether they may share memory
    tcp: TcpEndpoint | None  # where it listens for other hosts; None: it has none to listen for
    accelerator: str
    threads: int
    cpus: tuple[int, ...] | None  # cores that it is pinned to
    memory_bytes: int | None  # limit beyond the memory of an idle worker
    max_frame_bytes: int
    shared_memory: bool  # whether it may exchange large tensors through memory
    log_level: int  # lowest level of the log records that it sends to the caller
    emulation: Emulation  # at first
    weight_folders: WeightFolders | None = None  # None: it reads the caller's files


class WorkerForked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker has been forked; its pidfd is sent with this message."""

    name: str
    pid: int


class WorkerEnded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A forked worker has ended, with this exit code, or minus the number of the signal that ended it."""

    pid: int
    exit_code: int

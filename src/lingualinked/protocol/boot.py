"""What started processes and the caller tell each other over sockets: never in arguments or the environment.

Knows the words only, not how they are used. The very first line, the caller's import path, is `lingualinked.worker.__main__`'s.
"""

from __future__ import annotations

import msgspec

GRACE_S = 2.0
"""How long workers get to end by themselves before they are killed."""


class Preload(msgspec.Struct, frozen=True, kw_only=True):
    """First message to a started process: what to import before it forks workers, or becomes one.

    Parameters
    ----------
    caller_pid : int
        The process whose end ends this one.
    forks : bool
        Whether it stays and forks workers for the clusters whose sockets follow, or becomes the worker of the one `Boot`.
    socket_folder : str
        The folder that it removes once the caller is gone.
    class_names : tuple of str
        transformers classes whose code the workers will need.
    """

    caller_pid: int
    forks: bool
    socket_folder: str
    class_names: tuple[str, ...] = ()


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster's request for one worker; beside it travels the socket on which the worker alone talks about its `Boot`.

    Parameters
    ----------
    name : str
        The device's name.
    class_names : tuple of str
        transformers classes to import before it is forked, unless they are already.
    """

    name: str
    class_names: tuple[str, ...] = ()


class LinkFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What messages to another party are to go through.

    Parameters
    ----------
    target : str
        The party's name.
    bandwidth_bytes_per_s : float or None
        ``None``: as fast as it goes (JSON has no infinity).
    latency_s : float
        One way.
    """

    target: str
    bandwidth_bytes_per_s: float | None
    latency_s: float


class Emulation(msgspec.Struct, frozen=True, kw_only=True):
    """The slower device that a worker behaves as.

    Parameters
    ----------
    slowdown : float
        How many times slower it computes.
    links : tuple of LinkFigures
        Its outgoing links.
    delayed_from : tuple of str
        Parties whose messages to it are held back until they would have arrived.
    """

    slowdown: float
    links: tuple[LinkFigures, ...]
    delayed_from: tuple[str, ...]


class WorkerKey(msgspec.Struct, frozen=True, kw_only=True):
    """The first thing that a worker says: its `Boot` follows once the caller takes messages under this key.

    Parameters
    ----------
    public_key : str
        Of a CURVE key pair that it has made (Z85 text). The secret half never leaves the process.
    """

    public_key: str


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker is told, and nobody else: who it is, whom it may talk to, and what it may use.

    Parameters
    ----------
    name : str
        The device's name.
    socket_folder : str
        Where its own socket is to lie; it removes the folder once the caller is gone.
    caller_address, caller_key : str
        Where the caller's inbox listens, and its public key.
    caller_pid : int
        The process whose end ends this worker.
    accelerator : str
        Where its stages compute.
    threads : int
        Threads that it computes with.
    cpus : tuple of int or None
        Cores that it is pinned to.
    memory_bytes : int or None
        Limit on what it holds beyond an idle worker.
    max_frame_bytes : int
        Largest frame that it sends or takes.
    log_level : int
        Lowest level of the log records that it sends to the caller.
    emulation : Emulation
        The device that it behaves as, to begin with.
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


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker has been forked; on Linux a pidfd of it travels beside this line."""

    name: str
    pid: int


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A forked worker has ended, with the status that ``waitpid`` gave."""

    pid: int
    status: int
